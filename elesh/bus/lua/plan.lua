-- Make a checkpoint into parts: store the plan, append a message for each part, set the deadline and
-- acknowledge the checkpoint, in one step.
-- KEYS: the checkpoint's stream, the plan, the record of its decision, the work stream, the deadlines.
-- ARGV: group, consumer, entry id, the plan's key, fingerprint, its seconds to live, milliseconds
--       until its deadline, number of the plan's fields, these, then for each part the number of its
--       fields and the fields.
-- Returns planned, duplicate (planned or decided before), conflict (for other content: the entry stays pending)
-- or lost.
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 'lost' end
local stored = redis.call('HGET', KEYS[2], 'fingerprint') or redis.call('HGET', KEYS[3], 'fingerprint')
if stored and stored ~= ARGV[5] then return 'conflict' end
if not stored then
  local length = tonumber(ARGV[8])
  redis.call('ZADD', KEYS[5], now() + tonumber(ARGV[7]), ARGV[4])
  local at = 9 + length
  while at <= #ARGV do
    append(KEYS[4], at + 1, tonumber(ARGV[at]))
    at = at + 1 + tonumber(ARGV[at])
  end
  redis.call('HSET', KEYS[2], 'fingerprint', ARGV[5], unpack(ARGV, 9, 8 + length))
  redis.call('EXPIRE', KEYS[2], ARGV[6])
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
return stored and 'duplicate' or 'planned'
