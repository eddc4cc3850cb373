-- Store, publish and acknowledge in one step what an entry led to.
-- KEYS: the entry's stream, the decisions' stream, the dead letters, the result's record, the pointer
-- to the latest one of its run, then keys that have served with the entry and go.
-- ARGV: group, consumer, entry id, the record's seconds to live, the result's key, its fingerprint,
-- its epoch (-1: the pointer stays), the number of its fields and the fields, the envelope first,
-- then the fields of a dead letter that goes along, if there is one.
-- Returns settled, duplicate, conflict or lost.
local source, decisions, dead, record, pointer = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local key, fingerprint, epoch = ARGV[5], ARGV[6], tonumber(ARGV[7])
local length = tonumber(ARGV[8])
if not owned(source, ARGV[1], ARGV[2], ARGV[3]) then return 'lost' end

local stored = redis.call('HGET', record, 'fingerprint')
-- An entry in conflict stays pending: its owner makes it a dead letter.
if stored and stored ~= fingerprint then return 'conflict' end
if not stored then
  if epoch >= 0 and epoch >= (tonumber(redis.call('HGET', pointer, 'epoch')) or -1) then
    redis.call('HSET', pointer, 'epoch', ARGV[7], 'key', key)
    redis.call('EXPIRE', pointer, ARGV[4])
  end
  local done, failure = pcall(function()
    local time = redis.call('TIME')
    redis.call('HSET', record, 'fingerprint', fingerprint, 'envelope', ARGV[10],
      'decided_at', string.format('%d.%06d', time[1], time[2]))
    redis.call('EXPIRE', record, ARGV[4])
    append(decisions, 9, length)
  end)
  if not done then  -- a record says that its decision was published
    redis.call('HDEL', record, 'fingerprint', 'envelope', 'decided_at')
    error(type(failure) == 'table' and failure or {err = failure})
  end
end
local rest = #ARGV - 8 - length
if rest > 0 then append(dead, 9 + length, rest) end
for i = 6, #KEYS do redis.call('DEL', KEYS[i]) end
redis.call('XACK', source, ARGV[1], ARGV[3])
return stored and 'duplicate' or 'settled'
