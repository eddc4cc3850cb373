-- Acknowledge a pending entry, first appending a message elsewhere if there is one, and delete keys
-- that have served with it.
-- KEYS: the entry's stream, the other stream if there is a message, keys to delete.
-- ARGV: group, consumer, entry id, the message's fields...
-- Returns 1, or 0 if the consumer does not own the entry (then nothing changes).
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
local served = 2
if #ARGV > 3 then
  append(KEYS[2], 4, #ARGV - 3)
  served = 3
end
for i = served, #KEYS do redis.call('DEL', KEYS[i]) end
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
