-- A worker says that it is there and what it does.
-- KEYS: the worker's hash, the index. ARGV: worker, time to live in ms, the process's token, then
--       names and values.
-- The index holds each worker's end of life by the server's clock; those that are over go.
-- Returns 1; or 0 if the name is another process's, which nothing is changed of.
local held = redis.call('HGET', KEYS[1], 'token')
if held and held ~= ARGV[3] then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'heard_at', now / 1000, 'token', ARGV[3], unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), ARGV[1])
return 1
