-- Start the leases of pending entries anew, where `consumer` still owns them.
-- KEYS: the stream of each entry. ARGV: group, consumer, entry ids...
-- Returns the positions (from 1) of the entries that were lost.
local lost = {}
for i, stream in ipairs(KEYS) do
  local entry = ARGV[2 + i]
  if owned(stream, ARGV[1], ARGV[2], entry) then
    -- JUSTID: a renewal is not a delivery and must not be counted as one.
    redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, entry, 'JUSTID')
  else
    lost[#lost + 1] = i
  end
end
return lost
