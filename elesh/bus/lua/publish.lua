-- Append a message once: a second publish of the same event answers with the first one's entry.
-- KEYS: stream, marker of the event. ARGV: marker's seconds to live, fields...
local known = redis.call('GET', KEYS[2])
if known then return known end
local entry = append(KEYS[1], 2, #ARGV - 1)
redis.call('SET', KEYS[2], entry, 'EX', ARGV[1])
return entry
