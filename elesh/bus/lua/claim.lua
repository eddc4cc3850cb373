-- Hand out new entries without waiting: the first stream's first, then the next one's.
-- KEYS: streams. ARGV: group, consumer, how many entries at most.
-- Returns for each stream that had any its position and the entries; NOGROUP if a group is missing.
local found, left = {}, tonumber(ARGV[3])
for i, stream in ipairs(KEYS) do
  if left == 0 then break end
  local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', left,
    'STREAMS', stream, '>')
  if reply then
    found[#found + 1] = {i, reply[1][2]}
    left = left - #reply[1][2]
  end
end
return found
