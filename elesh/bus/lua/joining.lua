-- Put before the scripts that may queue a plan's join.

-- Append the join of a plan, once in its life; true if this call did.
local function join(plan, work, deadlines, key)
  if redis.call('EXISTS', plan) == 0 or redis.call('HEXISTS', plan, 'joined') == 1 then
    redis.call('ZREM', deadlines, key)
    return false
  end
  local parts = redis.call('HMGET', plan, 'join', 'traceparent', 'tracestate')
  local fields = {'envelope', parts[1] or ''}
  for i, name in ipairs({'traceparent', 'tracestate'}) do
    if parts[i + 1] and parts[i + 1] ~= '' then
      fields[#fields + 1], fields[#fields + 2] = name, parts[i + 1]
    end
  end
  redis.call('XADD', work, '*', unpack(fields))
  redis.call('HSET', plan, 'joined', 1)
  redis.call('ZREM', deadlines, key)
  return true
end
