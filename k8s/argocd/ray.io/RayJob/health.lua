-- Health of a KubeRay RayJob, by the states of its controller (status.jobDeploymentStatus) and of Ray's job (status.jobStatus).

-- The controller puts the end of the job's log behind a failure, up to 20,000 characters; the last lines say why. Argo CD has
-- no library of strings to cut them out with, unless its setting useOpenLibs is on for RayJob.
local function last_lines(text, count)
  if string == nil then
    return text or ""
  end
  local lines = {}
  for line in string.gmatch(text or "", "[^\r\n]+") do
    table.insert(lines, line)
  end
  local first = #lines - count + 1
  return table.concat(lines, "\n", first > 1 and first or 1)
end

local spec = obj.spec or {}
local status = obj.status or {}
local phase = status.jobDeploymentStatus or ""
local job = status.jobStatus or ""

if phase == "Complete" then
  if job == "SUCCEEDED" then
    return { status = "Healthy", message = "the job has succeeded" }
  end
  return { status = "Degraded", message = "the job is " .. (job == "" and "over" or job) .. ": " .. last_lines(status.message, 5) }
end
if phase == "Failed" or phase == "ValidationFailed" then
  return { status = "Degraded", message = (status.reason or phase) .. ": " .. last_lines(status.message, 5) }
end
if phase == "Suspended" or (phase == "" and spec.suspend) then
  return { status = "Suspended", message = "the job is suspended; it waits in a queue, or for spec.suspend to become false" }
end
if phase == "Suspending" then
  return { status = "Progressing", message = "the job is being suspended, its cluster deleted" }
end
if phase == "Retrying" then
  return { status = "Progressing", message = "attempt " .. (status.failed or "?") .. " has failed, another one begins" }
end
if phase == "Running" then
  local attempt = (status.failed or 0) > 0 and (", attempt " .. (status.failed + 1)) or ""
  return { status = "Progressing", message = "the job is " .. (job == "" and "being submitted" or job) .. attempt }
end
if phase == "Initializing" then
  return { status = "Progressing", message = "the cluster " .. (status.rayClusterName or "") .. " is coming up" }
end
if phase == "Waiting" then
  return { status = "Progressing", message = "the cluster is up, the job is waited for" }
end
return { status = "Progressing", message = phase == "" and "the operator has not taken up the job yet" or phase }
