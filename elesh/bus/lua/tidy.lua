-- Shorten streams towards `length` entries, never past an entry that a group still needs, and forget
-- consumers that have long been silent with nothing pending.
-- KEYS: streams. ARGV: length, milliseconds of silence, then for each stream 1 if it may be capped
--       while it has no group.
-- Returns for each stream the number of entries removed.
local length, silence = tonumber(ARGV[1]), tonumber(ARGV[2])

local function fields(flat)
  local map = {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

local function before(a, b)
  local a_time, a_number = string.match(a, '(%d+)-(%d+)')
  local b_time, b_number = string.match(b, '(%d+)-(%d+)')
  if a_time ~= b_time then return tonumber(a_time) < tonumber(b_time) end
  return tonumber(a_number) < tonumber(b_number)
end

-- One with pending entries stays: they would be destroyed.
local function forget(stream, group)
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local consumer = fields(flat)
    if consumer['pending'] == 0 and consumer['idle'] > silence then
      redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer['name'])
    end
  end
end

local function shorten(stream, groups, capped)
  local excess = redis.call('XLEN', stream) - length
  if excess <= 0 then return 0 end
  local needed = nil
  for _, group in ipairs(groups) do
    local oldest = redis.call('XPENDING', stream, group['name'])[2] or group['last-delivered-id']
    if not needed or before(oldest, needed) then needed = oldest end
  end
  if needed then return redis.call('XTRIM', stream, 'MINID', '~', needed, 'LIMIT', excess) end
  if capped then return redis.call('XTRIM', stream, 'MAXLEN', '~', length) end
  return 0
end

local removed = {}
for i, stream in ipairs(KEYS) do
  removed[i] = 0
  if redis.call('EXISTS', stream) == 1 then
    local groups = {}
    for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
      groups[#groups + 1] = fields(flat)
      forget(stream, groups[#groups]['name'])
    end
    removed[i] = shorten(stream, groups, ARGV[2 + i] == '1')
  end
end
return removed
