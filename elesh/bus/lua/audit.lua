-- Append entries to the audit log, if no other writer was faster: one chain under any number of writers.
-- KEYS: stream, head of the chain. ARGV: digest that the head must have (empty: no entry yet),
-- number and digest of the new last entry, number of the head's fields, their names and values in turn,
-- then for each entry the number of its fields and the fields.
-- Returns 1, or 0 if the head has moved on (then nothing changes).
if (redis.call('HGET', KEYS[2], 'digest') or '') ~= ARGV[1] then return 0 end
require_allowed('HSET', KEYS[2], 'number', ARGV[2])
local at = 5 + 2 * tonumber(ARGV[4])
local appended = at <= #ARGV
while at <= #ARGV do
  append(KEYS[1], at + 1, tonumber(ARGV[at]))
  at = at + 1 + tonumber(ARGV[at])
end
for i = 5, 3 + 2 * tonumber(ARGV[4]), 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
if appended then redis.call('HSET', KEYS[2], 'number', ARGV[2], 'digest', ARGV[3]) end
return 1
