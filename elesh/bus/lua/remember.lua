-- Keep one epoch's measurements of a run; the newest epochs stay, within a number and a size.
-- KEYS: the run's hash (epoch -> blob). ARGV: epoch, blob, most epochs, most bytes, seconds to live.
-- Returns kept, known, conflict (the epoch is there with other content) or old.
local epoch, blob, most, bytes = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local known = redis.call('HGET', KEYS[1], epoch)
if known then
  redis.call('EXPIRE', KEYS[1], ARGV[5])
  return known == blob and 'known' or 'conflict'
end

local epochs, total = {}, #blob
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.match(field, '^%d+$') then
    epochs[#epochs + 1] = tonumber(field)
    total = total + redis.call('HSTRLEN', KEYS[1], field)
  else
    redis.call('HDEL', KEYS[1], field)  -- not of ours
  end
end
table.sort(epochs)
local oldest = 1
while #epochs - oldest + 2 > most or total > bytes do
  -- Nothing older than what is here makes room for what is older still.
  if oldest > #epochs or epochs[oldest] > tonumber(epoch) then return 'old' end
  local field = string.format('%.0f', epochs[oldest])
  total = total - redis.call('HSTRLEN', KEYS[1], field)
  redis.call('HDEL', KEYS[1], field)
  oldest = oldest + 1
end
redis.call('HSET', KEYS[1], epoch, blob)
redis.call('EXPIRE', KEYS[1], ARGV[5])
return 'kept'
