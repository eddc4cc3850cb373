-- Shorten a stream towards `length` entries, never past an entry that a group still needs.
-- KEYS: stream. ARGV: length, 1 if it may be capped while it has no group.
-- Returns the number of entries removed.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local excess = redis.call('XLEN', KEYS[1]) - tonumber(ARGV[1])
if excess <= 0 then return 0 end

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

local needed = nil
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = fields(flat)
  local oldest = redis.call('XPENDING', KEYS[1], group['name'])[2] or group['last-delivered-id']
  if not needed or before(oldest, needed) then needed = oldest end
end

if needed then
  return redis.call('XTRIM', KEYS[1], 'MINID', '~', needed, 'LIMIT', excess)
end
if ARGV[2] == '1' then return redis.call('XTRIM', KEYS[1], 'MAXLEN', '~', ARGV[1]) end
return 0
