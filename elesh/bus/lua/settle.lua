-- Store, publish and acknowledge in one step what one entry led to.
-- KEYS: the entry's stream, the decisions' stream, one record for each result.
-- ARGV: group, consumer, entry id, records' seconds to live, then for each result its
-- fingerprint, the number of its fields and the fields, the envelope first.
-- Returns one verdict for each result: settled, duplicate, conflict or lost.
local source, decisions = KEYS[1], KEYS[2]
local verdicts = {}
if not owned(source, ARGV[1], ARGV[2], ARGV[3]) then
  for i = 3, #KEYS do verdicts[#verdicts + 1] = 'lost' end
  return verdicts
end

local time = redis.call('TIME')
local conflict, at = false, 5
for i = 3, #KEYS do
  local record, fingerprint, length = KEYS[i], ARGV[at], tonumber(ARGV[at + 1])
  local stored = redis.call('HGET', record, 'fingerprint')
  if not stored then
    redis.call('HSET', record, 'fingerprint', fingerprint, 'envelope', ARGV[at + 3],
      'decided_at', string.format('%d.%06d', time[1], time[2]))
    redis.call('EXPIRE', record, ARGV[4])
    append(decisions, at + 2, length)
    verdicts[#verdicts + 1] = 'settled'
  elseif stored == fingerprint then
    verdicts[#verdicts + 1] = 'duplicate'
  else
    verdicts[#verdicts + 1] = 'conflict'
    conflict = true
  end
  at = at + 2 + length
end
-- An entry in conflict stays pending: its owner makes it a dead letter.
if not conflict then redis.call('XACK', source, ARGV[1], ARGV[3]) end
return verdicts
