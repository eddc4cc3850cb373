-- One pass of the fleet's only reaper: delayed entries that are due go on, and entries whose lease
-- ran out are requeued for any worker. A worker that finds no reaper becomes it, until its lease runs out.
-- KEYS: reaper, delayed set, deadlines, heartbeat, redeliveries, then the streams that are reaped.
-- ARGV: worker, the reaper's lease, the grace after a silence, the entries' lease, how long nobody
--       may have called for it to be a silence (all in milliseconds), group, pending entries to look
--       at in each stream, entries to move at most, then the streams' names.
-- Returns 0 and the milliseconds until there may be no reaper; or 1, the number of delayed entries
-- moved, the entries that were taken from their owners (stream, id, owner), the plans past their
-- deadline, and the milliseconds until the first of all that was looked at may be due.
local worker, group, scan, batch = ARGV[1], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local at = now()
-- Every caller, the reaper or not, is a sign that the server could be reached all the while.
local heartbeat = redis.call('HMGET', KEYS[4], 'at', 'since')
local since = tonumber(heartbeat[2])
local last = tonumber(heartbeat[1])
if not since or not last or at - last > tonumber(ARGV[5]) then since = at end
redis.call('HSET', KEYS[4], 'at', string.format('%.0f', at), 'since', string.format('%.0f', since))
redis.call('PEXPIRE', KEYS[4], 10 * ARGV[4])

local holder = redis.call('HGET', KEYS[1], 'holder')
local lease = redis.call('PTTL', KEYS[1])
if holder and holder ~= worker and lease >= 0 then return {0, lease} end
if holder ~= worker then redis.call('HSET', KEYS[1], 'holder', worker) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])

-- The fields of a delayed entry; what somebody else put there goes on as a message that is none.
local function delayed(packed)
  local known, fields = pcall(cmsgpack.unpack, packed)
  known = known and type(fields) == 'table' and #fields > 0 and #fields % 2 == 0
  for _, field in ipairs(known and fields or {}) do known = known and type(field) == 'string' end
  return known and fields or {'envelope', packed}
end

local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', at, 'LIMIT', 0, batch)
for _, packed in ipairs(due) do
  redis.call('XADD', KEYS[5], '*', unpack(delayed(packed)))
  redis.call('ZREM', KEYS[2], packed)
end

local taken, soonest = {}, tonumber(ARGV[4])
local function take(stream, name, entry)
  local id, owner = entry[1], entry[2]
  local fields = again(stream, name, id, 'crash', owner, 'the lease ran out')
  if fields then redis.call('XADD', KEYS[5], '*', unpack(fields)) end
  redis.call('XACK', stream, group, id)
  taken[#taken + 1] = {name, id, owner}
end

-- A page of a stream's pending entries, from where the last pass ended: no deep one hides another.
local function reap(stream, name)
  local cursor = 'cursor:' .. name
  local start = redis.call('HGET', KEYS[1], cursor) or '-'
  local pending = redis.pcall('XPENDING', stream, group, start, '+', scan)
  if pending.err then  -- no group, or no place to go on from
    redis.call('HDEL', KEYS[1], cursor)
    return
  end
  require_allowed('XACK', stream, group, '0-0')
  local last = nil
  for _, entry in ipairs(pending) do
    if #taken >= batch then break end
    local left = tonumber(ARGV[4]) - entry[3]
    if left <= 0 then take(stream, name, entry) else soonest = math.min(soonest, left) end
    last = entry[1]
  end
  local whole = #pending < scan and (not last or last == pending[#pending][1])
  if whole then redis.call('HDEL', KEYS[1], cursor)
  elseif last then redis.call('HSET', KEYS[1], cursor, '(' .. last) end
end

-- Owners that a silence of the server kept from renewing have the grace to do so.
if at - since >= tonumber(ARGV[3]) then
  for i = 6, #KEYS do reap(KEYS[i], ARGV[i + 3]) end
end
local overdue = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', at, 'LIMIT', 0, batch)
for i = 2, 3 do
  local first = redis.call('ZRANGEBYSCORE', KEYS[i], string.format('(%.0f', at), '+inf',
    'WITHSCORES', 'LIMIT', 0, 1)
  if first[2] then soonest = math.min(soonest, tonumber(first[2]) - at) end
end
return {1, #due, taken, overdue, soonest}
