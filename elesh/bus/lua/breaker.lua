-- One circuit breaker, the same for the whole fleet; times are the server's, in milliseconds.
-- A closed breaker without failures has no key.
-- KEYS: breaker, index of all breakers, marker of the failure (only for `failure` with a token).
-- ARGV: operation, name in the index, reason, failures that open it, recovery, probe's lease,
--       milliseconds that state is kept.
-- Returns: state before, state after, failures, reason, opened at, now, admitted, probe.
local operation, name, reason = ARGV[1], ARGV[2], ARGV[3]
local limit, recovery, lease, keep = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local stored = redis.call('HMGET', KEYS[1], 'state', 'failures', 'reason', 'opened_at', 'probe_until')
local before = stored[1] or 'closed'
local breaker = {
  state = before, failures = tonumber(stored[2] or 0), reason = stored[3] or '',
  opened_at = tonumber(stored[4] or 0), probe_until = tonumber(stored[5] or 0),
}
local admitted, probe, changed = before == 'closed', false, false

local function open()
  breaker.state, breaker.opened_at, breaker.probe_until = 'open', now, 0
end

local operations = {}

function operations.look()
  -- For who may read and not write.
end

function operations.view()
  -- What expired is forgotten by name, too.
  changed = not stored[1]
end

function operations.admit()
  local rested = before == 'open' and now >= breaker.opened_at + recovery
  local deserted = before == 'half_open' and now >= breaker.probe_until
  if rested or deserted then
    breaker.state, breaker.probe_until = 'half_open', now + lease
    admitted, probe, changed = true, true, true
  end
end

function operations.failure()
  local first = not KEYS[3] or redis.call('SET', KEYS[3], 1, 'NX', 'PX', keep)
  if first then breaker.failures = breaker.failures + 1 end
  breaker.reason, changed = reason, true
  -- A probe that fails has failed, however often its message was delivered.
  if before == 'half_open' or (before == 'closed' and breaker.failures >= limit) then open() end
end

function operations.success()
  -- Work that was admitted before the breaker opened says nothing about recovery.
  if before ~= 'open' then operations.reset() end
end

function operations.reset()
  breaker = {state = 'closed', failures = 0, reason = '', opened_at = 0, probe_until = 0}
  changed = true
end

function operations.trip()
  breaker.reason, changed = reason, true
  open()
end

operations[operation]()
if changed and breaker.state == 'closed' and breaker.failures == 0 then
  redis.call('DEL', KEYS[1])
  redis.call('SREM', KEYS[2], name)
elseif changed then
  redis.call('HSET', KEYS[1], 'state', breaker.state, 'failures', breaker.failures,
    'reason', breaker.reason, 'opened_at', string.format('%.0f', breaker.opened_at),
    'probe_until', string.format('%.0f', breaker.probe_until))
  redis.call('PEXPIRE', KEYS[1], keep)
  redis.call('SADD', KEYS[2], name)
end
return {before, breaker.state, breaker.failures, breaker.reason, breaker.opened_at, now,
  admitted and 1 or 0, probe and 1 or 0}
