-- Put before every other script: who owns a pending entry, and how a message is appended.

-- True if `consumer` owns the pending entry `id`; a group that vanished owns nothing.
local function owned(stream, group, consumer, id)
  local pending = redis.pcall('XPENDING', stream, group, id, id, 1)
  if pending.err then
    if string.find(pending.err, 'NOGROUP', 1, true) then return false end
    error(pending)
  end
  return pending[1] ~= nil and pending[1][2] == consumer
end

-- XADD of the flat list of fields at ARGV[first .. first + length - 1]; returns the entry's id.
local function append(stream, first, length)
  return redis.call('XADD', stream, '*', unpack(ARGV, first, first + length - 1))
end
