-- Forget a consumer, unless entries are pending with it: they would be destroyed.
-- KEYS: stream. ARGV: group, consumer. Returns 1 if it was forgotten.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return 0 end
  error(pending)
end
if pending[1] then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
