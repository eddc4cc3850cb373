-- Queue the join of a plan whose deadline is over, whatever parts are there.
-- KEYS: the plan, the work stream, the deadlines. ARGV: the plan's key.
-- Returns 1 if the join was queued now.
return join(KEYS[1], KEYS[2], KEYS[3], ARGV[1]) and 1 or 0
