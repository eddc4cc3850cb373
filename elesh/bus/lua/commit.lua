-- Store, publish and acknowledge in one step what one entry led to.
-- KEYS: the entry's stream, the decisions' stream, the dead letters, for each result its record and
-- the pointer to the latest one of its run, then keys that have served with the entry and go.
-- ARGV: group, consumer, entry id, records' seconds to live, number of results, number of fields of
-- a dead letter that goes along (0: none) and these, then for each result its key, fingerprint,
-- epoch (-1: the pointer stays), the number of its fields and the fields, the envelope first.
-- Returns one verdict for each result: settled, duplicate, conflict or lost.
local source, decisions, results = KEYS[1], KEYS[2], tonumber(ARGV[5])
local verdicts = {}
if not owned(source, ARGV[1], ARGV[2], ARGV[3]) then
  for i = 1, results do verdicts[i] = 'lost' end
  return verdicts
end

local function point(pointer, key, epoch)
  local known = tonumber(redis.call('HGET', pointer, 'epoch') or -1)
  if tonumber(epoch) < 0 or tonumber(epoch) < known then return end
  redis.call('HSET', pointer, 'epoch', epoch, 'key', key)
  redis.call('EXPIRE', pointer, ARGV[4])
end

local time = redis.call('TIME')
local conflict, at = false, 7 + tonumber(ARGV[6])
for i = 1, results do
  local record, pointer = KEYS[2 + 2 * i], KEYS[3 + 2 * i]
  local key, fingerprint, epoch, length = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  local stored = redis.call('HGET', record, 'fingerprint')
  if not stored then
    redis.call('HSET', record, 'fingerprint', fingerprint, 'envelope', ARGV[at + 5],
      'decided_at', string.format('%d.%06d', time[1], time[2]))
    redis.call('EXPIRE', record, ARGV[4])
    append(decisions, at + 4, length)
    point(pointer, key, epoch)
    verdicts[i] = 'settled'
  elseif stored == fingerprint then
    verdicts[i] = 'duplicate'
  else
    verdicts[i] = 'conflict'
    conflict = true
  end
  at = at + 4 + length
end
-- An entry in conflict stays pending: its owner makes it a dead letter.
if not conflict then
  if tonumber(ARGV[6]) > 0 then append(KEYS[3], 7, tonumber(ARGV[6])) end
  for i = 4 + 2 * results, #KEYS do redis.call('DEL', KEYS[i]) end
  redis.call('XACK', source, ARGV[1], ARGV[3])
end
return verdicts
