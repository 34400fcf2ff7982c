-- Health of a KubeRay RayCluster, by its conditions and the number of its workers.

local status = obj.status
if status == nil then
  return { status = "Progressing", message = "the operator has not taken up the cluster yet" }
end
if status.observedGeneration ~= nil and status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "the operator has not taken up the last change yet" }
end

local is, message = {}, {}
for _, condition in ipairs(status.conditions or {}) do
  is[condition.type] = condition.status == "True"
  message[condition.type] = condition.message
end

if is.ReplicaFailure then
  return { status = "Degraded", message = message.ReplicaFailure }
end
if status.state == "failed" then
  return { status = "Degraded", message = status.reason or "the operator cannot bring the cluster up" }
end
if is.RayClusterSuspending then
  return { status = "Progressing", message = "the cluster is being suspended" }
end
if is.RayClusterSuspended or status.state == "suspended" then
  return { status = "Suspended", message = "the cluster is suspended" }
end
-- Operators before 1.3 have no conditions.
if is.HeadPodReady == false or (is.HeadPodReady == nil and status.state ~= "ready") then
  local why = message.HeadPodReady
  return { status = "Progressing", message = "the head is not ready" .. ((why or "") ~= "" and (": " .. why) or "") }
end
local ready, wanted = status.readyWorkerReplicas or 0, status.desiredWorkerReplicas or 0
if ready < wanted then
  return { status = "Progressing", message = ready .. " of " .. wanted .. " workers are ready" }
end
return { status = "Healthy", message = "the head and " .. ready .. " workers are ready" }
