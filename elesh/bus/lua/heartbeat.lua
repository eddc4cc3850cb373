-- A worker says that it is there and what it does.
-- KEYS: the worker's hash, the index. ARGV: worker, time to live in ms, then names and values.
-- The index holds each worker's end of life by the server's clock; those that are over go.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'heard_at', now / 1000, unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), ARGV[1])
