-- Requeue a pending entry: as a new entry with its history, at once or later.
-- KEYS: the entry's stream, the redeliveries, the delayed set.
-- ARGV: group, consumer, entry id, the stream's short name, cause ('' leaves no trace), worker,
--       detail, milliseconds to wait.
-- Returns 1, or 0 if the consumer does not own the entry (then nothing changes).
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
local fields = again(KEYS[1], ARGV[4], ARGV[3], ARGV[5], ARGV[6], ARGV[7])
if fields and tonumber(ARGV[8]) > 0 then
  redis.call('ZADD', KEYS[3], now() + tonumber(ARGV[8]), cmsgpack.pack(fields))
elseif fields then
  redis.call('XADD', KEYS[2], '*', unpack(fields))
end
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
