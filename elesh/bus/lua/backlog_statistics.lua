-- How much is where. KEYS: streams. ARGV: the group of each, empty where it has none.
-- Returns, for each stream: length, never delivered (-1: unknown), delivered and not acknowledged,
-- age of the oldest entry that is not done in ms (-1: none), the longest time in ms since the lease
-- of one of the first thousand pending entries was renewed (-1: none).
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function age(id)
  return now - tonumber(string.match(id, '^%d+'))
end

local function group_of(stream, name)
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  for _, flat in ipairs(groups.err and {} or groups) do
    local map = {}
    for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
    if map['name'] == name then return map end
  end
end

local function figures(stream, name)
  local length = redis.call('XLEN', stream)
  if name == '' then return {length, 0, 0, -1, -1} end
  local group = group_of(stream, name)
  local lag, pending, after, lease = length, 0, '-', -1
  if group then
    lag, pending, after = group['lag'] or -1, group['pending'], '(' .. group['last-delivered-id']
    for _, entry in ipairs(redis.call('XPENDING', stream, name, '-', '+', 1000)) do
      if entry[3] > lease then lease = entry[3] end
    end
  end
  local oldest = pending > 0 and redis.call('XPENDING', stream, name)[2]
  if not oldest then
    local first = redis.call('XRANGE', stream, after, '+', 'COUNT', 1)[1]
    oldest = first and first[1]
  end
  return {length, lag, pending, oldest and age(oldest) or -1, lease}
end

local found = {}
for i, stream in ipairs(KEYS) do found[i] = figures(stream, ARGV[i]) end
return found
