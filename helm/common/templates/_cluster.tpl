{{- /* Whether Ray requires a token. Default: yes if both Ray and the operator support it. The operator gives the token to pods and submitters. */}}
{{- define "common.authEnabled" -}}
{{- $able := and (semverCompare ">=2.52.0-0" .Values.rayVersion) (semverCompare ">=1.6.0-0" .Values.kuberayVersion) -}}
{{- if ternary $able .Values.auth.enabled (kindIs "invalid" .Values.auth.enabled) }}true{{ end -}}
{{- end }}

{{- /*
The specification of a Ray cluster: a head that runs no tasks, workers that hold the actors, and optional CPU workers.
It spells out the defaults that the CRD would fill in within lists, so that GitOps tools see no false difference.
Takes dict root job; job is the name of the ConfigMap with the job, or empty.
*/}}
{{- define "common.cluster" -}}
{{- $capacity := fromJson (include "common.capacity" .root) -}}
{{- $scaling := .root.Values.autoscaling -}}
rayVersion: {{ .root.Values.rayVersion | quote }}
enableInTreeAutoscaling: {{ $scaling.enabled }}
{{- if $scaling.enabled }}
autoscalerOptions:
  {{- include "common.autoscaler" . | nindent 2 }}
{{- end }}
{{- if include "common.authEnabled" .root }}
authOptions:
  mode: token
  {{- with .root.Values.auth.secretName }}
  secretName: {{ . | quote }}
  {{- end }}
{{- end }}
headGroupSpec:
  {{- include "common.head" (merge (dict "role" "head" "size" $capacity.head) .) | nindent 2 }}
workerGroupSpecs:
  {{- $min := ternary $scaling.minWorkers $capacity.workers.replicas $scaling.enabled }}
  - groupName: {{ ternary "gpu" "actors" (gt (int64 $capacity.workers.gpus) (int64 0)) }}
    replicas: {{ int64 $min }}
    minReplicas: {{ int64 $min }}
    maxReplicas: {{ int64 $capacity.workers.replicas }}
    {{- include "common.workers" (merge (dict "role" "workers" "size" $capacity.workers) .) | nindent 4 }}
  {{- if gt (int64 $capacity.cpuWorkers.replicas) (int64 0) }}
  - groupName: cpu
    {{- /* Ray does not add CPU workers for actors, so their number is fixed. */}}
    replicas: {{ int64 $capacity.cpuWorkers.replicas }}
    minReplicas: {{ int64 $capacity.cpuWorkers.replicas }}
    maxReplicas: {{ int64 $capacity.cpuWorkers.replicas }}
    {{- include "common.workers" (merge (dict "role" "cpuWorkers" "size" $capacity.cpuWorkers) .) | nindent 4 }}
  {{- end }}
{{- end }}

{{- /* Version 2 is explicit because the operator checks its rules only then. It sets restartPolicy to Never. */}}
{{- define "common.autoscaler" -}}
version: v2
upscalingMode: Default
idleTimeoutSeconds: {{ int64 .root.Values.autoscaling.idleTimeoutSeconds }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
resources:
  requests:
    cpu: 200m
    memory: 512Mi
  limits:
    memory: 512Mi
securityContext:
  {{- include "common.containerSecurityContext" . | nindent 2 }}
env:
  - name: HOME
    value: /tmp
volumeMounts:
  - name: scratch
    mountPath: /tmp
{{- end }}

{{- define "common.head" -}}
{{- $values := .root.Values -}}
rayStartParams:
  {{- /* Ray's own services only: no tasks and no actors, whatever the node has. */}}
  num-cpus: "0"
  num-gpus: "0"
  {{- include "common.rayStartParams" . | nindent 2 }}
template:
  metadata:
    {{- include "common.podMetadata" . | nindent 4 }}
  spec:
    serviceAccountName: {{ include "common.serviceAccountName" .root | quote }}
    {{- /* Only the autoscaler in the head's pod needs the API server. */}}
    automountServiceAccountToken: {{ $values.autoscaling.enabled }}
    {{- if $values.autoscaling.enabled }}
    restartPolicy: Never
    {{- end }}
    terminationGracePeriodSeconds: {{ int64 (get .root.Values .role).terminationGracePeriodSeconds }}
    {{- include "common.podSettings" . | nindent 4 }}
    containers:
      - name: ray-head
        {{- include "common.containerImage" .root | nindent 8 }}
        {{- /* Kubernetes' signal reaches only Ray; the hook stops the driver. */}}
        lifecycle:
          preStop:
            exec:
              command:
                - batch-inference
                - prestop
                - {{ sub (int64 $values.head.terminationGracePeriodSeconds) 5 | toString | quote }}
        securityContext:
          {{- include "common.containerSecurityContext" . | nindent 10 }}
        env:
          {{- $void := list (dict "name" "NVIDIA_VISIBLE_DEVICES" "value" "void") }}
          {{- include "common.env" (merge (dict "defaults" (concat (fromJsonArray (include "common.rayEnv" .)) $void)) .) | nindent 10 }}
        {{- include "common.envFrom" . | nindent 8 }}
        ports:
          - {name: gcs, containerPort: 6379, protocol: TCP}
          - {name: dashboard, containerPort: 8265, protocol: TCP}
          - {name: client, containerPort: 10001, protocol: TCP}
          - {name: metrics, containerPort: 8080, protocol: TCP}
        resources:
          requests:
            cpu: {{ include "common.requestedCpus" (dict "root" .root "cpus" $values.head.cpus) }}
            memory: {{ int64 .size.memoryMiB }}Mi
          limits:
            memory: {{ int64 .size.memoryMiB }}Mi
        {{- include "common.mounts" . | nindent 8 }}
    {{- include "common.volumes" . | nindent 4 }}
{{- end }}

{{- define "common.workers" -}}
{{- $group := get .root.Values .role -}}
{{- $gpus := int64 (default 0 .size.gpus) -}}
numOfHosts: 1
rayStartParams:
  {{- /* Explicit, because the operator and Ray's autoscaler derive GPUs from limits, each by its own rule. */}}
  num-cpus: {{ int64 .size.cpus | toString | quote }}
  num-gpus: {{ $gpus | toString | quote }}
  {{- include "common.rayStartParams" . | nindent 2 }}
template:
  metadata:
    {{- include "common.podMetadata" . | nindent 4 }}
  spec:
    serviceAccountName: {{ include "common.serviceAccountName" .root | quote }}
    automountServiceAccountToken: false
    {{- if .root.Values.autoscaling.enabled }}
    restartPolicy: Never
    {{- end }}
    terminationGracePeriodSeconds: {{ int64 (get .root.Values .role).terminationGracePeriodSeconds }}
    {{- include "common.podSettings" . | nindent 4 }}
    {{- if and $group.gpuClaimTemplate (gt $gpus (int64 0)) }}
    resourceClaims:
      - {name: gpus, resourceClaimTemplateName: {{ $group.gpuClaimTemplate | quote }}}
    {{- end }}
    containers:
      - name: ray-worker
        {{- include "common.containerImage" .root | nindent 8 }}
        securityContext:
          {{- include "common.containerSecurityContext" . | nindent 10 }}
        env:
          {{- include "common.env" (merge (dict "defaults" (fromJsonArray (include "common.rayEnv" .))) .) | nindent 10 }}
        {{- include "common.envFrom" . | nindent 8 }}
        ports:
          - {name: metrics, containerPort: 8080, protocol: TCP}
        resources:
          requests:
            {{- include "common.workerResources" (dict "root" .root "size" .size "group" $group "cpus" true) | nindent 12 }}
          limits:
            {{- include "common.workerResources" (dict "root" .root "size" .size "group" $group "cpus" $group.limitCpus) | nindent 12 }}
          {{- if and $group.gpuClaimTemplate (gt $gpus (int64 0)) }}
          claims:
            - {name: gpus}
          {{- end }}
        {{- include "common.mounts" . | nindent 8 }}
    {{- include "common.volumes" . | nindent 4 }}
{{- end }}

{{- define "common.workerResources" -}}
{{- if .cpus -}}
cpu: {{ include "common.requestedCpus" (dict "root" .root "cpus" .size.cpus) }}
{{ end -}}
memory: {{ int64 .size.memoryMiB }}Mi
{{- if and (gt (int64 (default 0 .size.gpus)) (int64 0)) (not .group.gpuClaimTemplate) }}
{{ .group.gpuResource }}: {{ int64 .size.gpus | toString | quote }}
{{- end }}
{{- end }}

{{- /* CPUs that a pod requests from Kubernetes; Ray schedules on more if they are overcommitted. */}}
{{- define "common.requestedCpus" -}}
{{- divf (include "common.units" (list .cpus 1000)) .root.Values.cpuOvercommit | ceil | int64 }}m
{{- end }}

{{- define "common.rayStartParams" -}}
object-store-memory: {{ mul (int64 .size.objectStoreMiB) 1048576 | toString | quote }}
{{- range $key, $value := (get .root.Values .role).rayStartParams }}
{{ $key }}: {{ $value | quote }}
{{- end }}
{{- end }}

{{- /* The root file system is read-only, so home and caches are on volumes. */}}
{{- define "common.rayEnv" -}}
{{- $values := .root.Values -}}
{{- /* After SIGTERM Ray gives a node no new work and waits for what runs there. The head has none, since its driver has ended before. */}}
{{- $drain := sub (int64 (get $values .role).terminationGracePeriodSeconds) 5 -}}
{{- $env := list
  (dict "name" "HOME" "value" "/tmp")
  (dict "name" "XDG_CACHE_HOME" "value" $values.modelCache.mountPath)
  (dict "name" "RAY_USAGE_STATS_ENABLED" "value" "0")
  (dict "name" "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "value" (ternary 0 $drain (eq .role "head") | toString))
-}}
{{- /* Jobs inherit it from the head, since only the cluster knows whether workers come on demand. */}}
{{- if $values.autoscaling.enabled -}}
{{- $env = append $env (dict "name" "BATCH_INFERENCE_WAIT_FOR_WORKERS_S" "value" (int64 $values.autoscaling.waitSeconds | toString)) -}}
{{- end -}}
{{- toJson $env -}}
{{- end }}

{{- define "common.mounts" -}}
volumeMounts:
  - name: scratch
    mountPath: /tmp
  - name: shared-memory
    mountPath: /dev/shm
  - name: model-cache
    mountPath: {{ .root.Values.modelCache.mountPath | quote }}
  {{- if .job }}
  - name: job
    mountPath: /etc/batch-inference
    readOnly: true
  {{- end }}
  {{- with (fromJson (include "common.both" (dict "root" .root "role" .role "key" "volumeMounts"))).it }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- /* Shared memory is a little larger than the object store, or Ray would put the store on disk. */}}
{{- define "common.volumes" -}}
volumes:
  - name: scratch
    emptyDir:
      sizeLimit: {{ int64 .root.Values.scratch.sizeGiB }}Gi
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {{ add (int64 .size.objectStoreMiB) 256 }}Mi
  - name: model-cache
    {{- with .root.Values.modelCache.claimName }}
    persistentVolumeClaim:
      claimName: {{ . | quote }}
    {{- else }}
    emptyDir:
      sizeLimit: {{ int64 .root.Values.modelCache.sizeGiB }}Gi
    {{- end }}
  {{- if .job }}
  - name: job
    configMap:
      name: {{ .job }}
  {{- end }}
  {{- with (fromJson (include "common.both" (dict "root" .root "role" .role "key" "volumes"))).it }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
