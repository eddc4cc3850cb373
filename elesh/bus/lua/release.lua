-- Give pending entries back unserved: their leases are over and their deliveries not counted.
-- KEYS: the stream of each entry. ARGV: group, consumer, lease in milliseconds, then for each
-- entry its id and the deliveries it had before.
for i, stream in ipairs(KEYS) do
  local entry, deliveries = ARGV[2 + 2 * i], ARGV[3 + 2 * i]
  if owned(stream, ARGV[1], ARGV[2], entry) then
    redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, entry,
      'IDLE', ARGV[3], 'RETRYCOUNT', deliveries, 'JUSTID')
  end
end
return #KEYS
