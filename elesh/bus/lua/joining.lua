-- Put before the scripts that may queue a plan's join.

-- Append the join of a plan, once in its life; true if this call did.
local function join(plan, work, deadlines, key)
  redis.call('ZREM', deadlines, key)
  if redis.call('EXISTS', plan) == 0 then return false end
  if redis.call('HSETNX', plan, 'joined', 1) == 0 then return false end
  local parts = redis.call('HMGET', plan, 'join', 'traceparent', 'tracestate')
  local fields = {'envelope', parts[1]}
  for i, name in ipairs({'traceparent', 'tracestate'}) do
    if parts[i + 1] and parts[i + 1] ~= '' then
      fields[#fields + 1], fields[#fields + 2] = name, parts[i + 1]
    end
  end
  redis.call('XADD', work, '*', unpack(fields))
  return true
end
