-- Acknowledge a pending entry, first appending a message elsewhere if there is one.
-- KEYS: the entry's stream, and the other stream if any. ARGV: group, consumer, entry id, fields...
-- Returns 1, or 0 if the consumer does not own the entry (then nothing changes).
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
if KEYS[2] then append(KEYS[2], 4, #ARGV - 3) end
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
