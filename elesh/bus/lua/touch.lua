-- Lengthen the life of a blob that is complete; returns 0 if any part of it is missing, or its head
-- says another size.
-- KEYS: head, chunks... ARGV: head's seconds to live, chunks' seconds to live, size.
if redis.call('GET', KEYS[1]) ~= ARGV[3] then return 0 end
for _, key in ipairs(KEYS) do
  if redis.call('EXISTS', key) == 0 then return 0 end
end
for i, key in ipairs(KEYS) do redis.call('EXPIRE', key, i == 1 and ARGV[1] or ARGV[2]) end
return 1
