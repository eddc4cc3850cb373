-- Replace the state of a circuit breaker, if it is still the one that the new one was made from.
-- KEYS: breaker, index of all breakers. ARGV: the state as it was read (empty: there was none), the
--       new one (empty: forget it), its name, 1 if the index lists it, milliseconds that it is kept.
-- Returns 1, or 0 if another was faster (then nothing changes).
if (redis.call('HGET', KEYS[1], 'signed') or '') ~= ARGV[1] then return 0 end
if ARGV[2] == '' then
  redis.call('DEL', KEYS[1])
else
  redis.call('HSET', KEYS[1], 'signed', ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[5])
end
redis.call(ARGV[4] == '1' and 'SADD' or 'SREM', KEYS[2], ARGV[3])
return 1
