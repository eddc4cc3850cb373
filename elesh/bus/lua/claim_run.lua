-- Claim a run for one trainer, or renew the claim; with a lease of 0, give it up.
-- KEYS: the run's claim. ARGV: token, who, lease in milliseconds.
-- Returns who holds it and the milliseconds that are left, if that is another; else false. A claim
-- that never ends is none of ours.
local held = redis.call('HMGET', KEYS[1], 'token', 'who')
local left = redis.call('PTTL', KEYS[1])
if held[1] and held[1] ~= ARGV[1] and left >= 0 then return {held[2] or '', left} end
if ARGV[3] == '0' then
  redis.call('DEL', KEYS[1])
else
  redis.call('HSET', KEYS[1], 'token', ARGV[1], 'who', ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return false
