-- Append a message once: a second publish of the same event answers with the first one's entry.
-- Where a group's backlog fills its stream, messages of lower priority are shed and counted.
-- KEYS: stream, marker of the event, counters of what was shed, and for a trainer its run's claim.
-- ARGV: marker's seconds to live, backlog from which to shed (0: never), group, the counter's name,
--       the claim's token ('' without one), fields...
-- Returns published and the entry's id; shed; or claimed and who has the run, if that is another.
local known = redis.call('GET', KEYS[2])
if known and known ~= '' then return {'published', known} end

if KEYS[4] then
  local held = redis.call('HMGET', KEYS[4], 'token', 'who')
  if held[1] and held[1] ~= ARGV[5] then return {'claimed', held[2] or ''} end
end

-- Entries that the group has not done; those it cannot count are not held against the message.
local function backlog(stream, name)
  if redis.call('EXISTS', stream) == 0 then return 0 end
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = {}
    for i = 1, #flat, 2 do group[flat[i]] = flat[i + 1] end
    if group['name'] == name then return (group['lag'] or 0) + group['pending'] end
  end
  return redis.call('XLEN', stream)
end

local limit = tonumber(ARGV[2])
if limit > 0 and backlog(KEYS[1], ARGV[3]) >= limit then
  redis.call('HINCRBY', KEYS[3], ARGV[4], 1)
  return {'shed', ''}
end
redis.call('SET', KEYS[2], '', 'EX', ARGV[1])  -- refused before the message is there, or not at all
local entry = append(KEYS[1], 6, #ARGV - 5)
redis.call('SET', KEYS[2], entry, 'EX', ARGV[1])
return {'published', entry}
