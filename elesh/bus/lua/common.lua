-- Put before other scripts: who owns a pending entry, the clock, how a message is appended, and how
-- an entry is requeued.

-- A server takes nothing back of a script that fails in its middle. So what may be refused (a right that
-- is missing, a key of another type) is found before the first change, or is the first change.

-- An error unless the user may do what follows: what was published beforehand would be there twice.
local function require_allowed(command, ...)
  if redis.acl_check_cmd and not redis.acl_check_cmd(command, ...) then
    error({err = 'NOPERM this user has no permissions to run the ' .. command .. ' command'})
  end
end

-- True if `consumer` owns the pending entry `id`; a group that vanished owns nothing. An error if it
-- may not acknowledge the entry.
local function owned(stream, group, consumer, id)
  local pending = redis.pcall('XPENDING', stream, group, id, id, 1)
  if pending.err then
    if string.find(pending.err, 'NOGROUP', 1, true) then return false end
    error(pending)
  end
  require_allowed('XACK', stream, group, '0-0')
  return pending[1] ~= nil and pending[1][2] == consumer
end

-- The server's time in milliseconds.
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- XADD of the flat list of fields at ARGV[first .. first + length - 1]; returns the entry's id.
local function append(stream, first, length)
  return redis.call('XADD', stream, '*', unpack(ARGV, first, first + length - 1))
end

-- More values than this cannot be passed on at once; messages of ours have ten.
local MAX_VALUES = 2000
local KEPT_ATTEMPTS = 16

-- An attempt more in an entry's history: counts by cause, and the last attempts in full. What is no
-- history of ours is begun anew.
local function lengthened(text, cause, worker, detail)
  local known, history = pcall(cjson.decode, text or '')
  if not known or type(history) ~= 'table' or type(history.attempts) ~= 'table' then
    history = {attempts = {}}
  end
  history[cause] = (tonumber(history[cause]) or 0) + 1
  table.insert(history.attempts, {cause, worker, string.format('%.0f', now()), detail})
  while #history.attempts > KEPT_ATTEMPTS do table.remove(history.attempts, 1) end
  return cjson.encode(history)
end

-- The fields with which the pending entry `id` of `stream` is requeued, nil if it was deleted:
-- its own, `origin` (where it stood first), and `history` with one attempt more if there is a cause.
local function again(stream, name, id, cause, worker, detail)
  local entry = redis.call('XRANGE', stream, id, id)[1]
  if not entry then return nil end
  local fields, origin, history = {}, name .. '/' .. id, nil
  for i = 1, math.min(#entry[2], MAX_VALUES), 2 do
    local field, value = entry[2][i], entry[2][i + 1]
    if field == 'origin' then origin = value
    elseif field == 'history' then history = value
    else fields[#fields + 1], fields[#fields + 2] = field, value end
  end
  if cause ~= '' then history = lengthened(history, cause, worker, detail) end
  fields[#fields + 1], fields[#fields + 2] = 'origin', origin
  if history then fields[#fields + 1], fields[#fields + 2] = 'history', history end
  return fields
end
