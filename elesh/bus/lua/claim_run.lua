-- Claim a run for one trainer, or renew the claim; with a lease of 0, give it up.
-- KEYS: the run's claim. ARGV: token, who, lease in milliseconds.
-- Returns who holds it and the milliseconds that are left, if that is another; else false.
local held = redis.call('HMGET', KEYS[1], 'token', 'who')
if held[1] and held[1] ~= ARGV[1] then return {held[2], redis.call('PTTL', KEYS[1])} end
if ARGV[3] == '0' then
  redis.call('DEL', KEYS[1])
else
  redis.call('HSET', KEYS[1], 'token', ARGV[1], 'who', ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return false
