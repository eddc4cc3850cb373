-- Delete a dead letter for good and say so in the operations stream, in one step.
-- KEYS: dead letters, marks by letter, operations. ARGV: letter's entry id, the operator's action's fields...
-- Returns 1, or 0 if there is no such dead letter (then nothing is written).
if redis.call('XDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HDEL', KEYS[2], ARGV[1])
append(KEYS[3], 2, #ARGV - 1)
return 1
