-- Store what became of one part of a plan and acknowledge its entry; the part that completes the
-- set queues the join.
-- KEYS: the entry's stream, the plan, its results, the work stream, the deadlines.
-- ARGV: group, consumer, entry id, the plan's key, the part's name, its result.
-- Returns stored, completed, duplicate (stored before; that one stays), gone (no such plan: the
-- entry stays pending) or lost.
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 'lost' end
local total = redis.call('HGET', KEYS[2], 'total')
if not total then return 'gone' end
local first = redis.call('HSETNX', KEYS[3], ARGV[5], ARGV[6]) == 1
redis.call('PEXPIRE', KEYS[3], redis.call('PTTL', KEYS[2]))
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
local complete = redis.call('HLEN', KEYS[3]) >= (tonumber(total) or math.huge)  -- else at its deadline
if complete and join(KEYS[2], KEYS[4], KEYS[5], ARGV[4]) then return 'completed' end
return first and 'stored' or 'duplicate'
