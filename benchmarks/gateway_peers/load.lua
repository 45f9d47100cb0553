-- Asks another question each time: the bodies of the file in BODIES, each with a running number in it.
local bodies, number = {}, 0
for line in io.lines(os.getenv("BODIES")) do
  local before, after = line:match("^(.-)@@@@@@@(.*)$")
  bodies[#bodies + 1] = { before, after }
end
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
for name, value in (os.getenv("HEADERS") or ""):gmatch("([^\n]-)=([^\n]*)\n") do wrk.headers[name] = value end
number = tonumber(os.getenv("NUMBER") or "0")

function request()
  number = number + 1
  local body = bodies[number % #bodies + 1]
  return wrk.format(nil, nil, nil, body[1] .. string.format("%07d", number % 10000000) .. body[2])
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "bad": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end
