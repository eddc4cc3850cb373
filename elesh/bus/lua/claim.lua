-- Hand out new entries without waiting: the first stream's first, then the next one's.
-- KEYS: streams. ARGV: group, consumer, how many entries at most.
-- Returns for each stream that had any its position and the entries; nothing if a group is missing.
local found, left = {}, tonumber(ARGV[3])
for i, stream in ipairs(KEYS) do
  if left == 0 then break end
  local reply = redis.pcall('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', left,
    'STREAMS', stream, '>')
  if type(reply) == 'table' and reply.err then
    -- What was found before is pending by now: it is handed out, and the next call says the error.
    if #found > 0 then return found end
    if string.find(tostring(reply.err), 'NOGROUP', 1, true) then return false end
    return reply
  end
  if reply and #reply > 0 then
    -- One pair of key and entries; fakeredis leaves out the list around it.
    local entries = type(reply[1]) == 'table' and reply[1][2] or reply[2]
    found[#found + 1] = {i, entries}
    left = left - #entries
  end
end
return found
