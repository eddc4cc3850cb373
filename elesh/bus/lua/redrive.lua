-- Publish a dead letter's original entry again, once: a second call answers with the first's entry.
-- KEYS: dead letters, marks by entry id, the original's stream, operations.
-- ARGV: the dead letter's entry id, number of original fields, the fields, the operator's action's fields...
-- Returns the new entry and 1, the known entry and 0, or an empty list if there is no such dead letter.
local dead, length = ARGV[1], tonumber(ARGV[2])
local known = redis.call('HGET', KEYS[2], dead)
if known then return {known, 0} end
if #redis.call('XRANGE', KEYS[1], dead, dead) == 0 then return {} end
local entry = append(KEYS[3], 3, length)
redis.call('HSET', KEYS[2], dead, entry)
append(KEYS[4], 3 + length, #ARGV - 2 - length)
return {entry, 1}
