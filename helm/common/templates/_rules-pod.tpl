{{- /* Settings that the operator refuses, overwrites or duplicates in pods, and that Kubernetes refuses when a pod is created. */}}

{{- /* Parameters of `ray start` that the chart computes, with the value to use instead. */}}
{{- define "common.rules.rayStartParams" -}}
{{- $memory := printf "%s.memoryGiB" .role -}}
{{- $owned := dict "num-cpus" (printf "%s.cpus" .role) "num-gpus" "workers.gpusPerWorker" "memory" $memory "object-store-memory" (printf "%s.objectStorePercent" .role) "resources" "workers.gpuResource" "labels" (printf "%s.labels" .role) -}}
{{- range $key, $value := .params -}}
{{- if hasKey $owned $key }}
{{ $.role }}.rayStartParams sets {{ $key }} to {{ $value }}, which the chart computes: use {{ get $owned $key }} instead
{{- else if hasPrefix "redis-" $key }}
{{ $.role }}.rayStartParams sets {{ $key }}, which the operator refuses: remove it; a job resumes from its output, without Redis
{{- else if has $key (list "address" "block" "head" "no-monitor" "plasma-directory" "metrics-export-port" "dashboard-port" "dashboard-host" "include-dashboard" "port") }}
{{ $.role }}.rayStartParams sets {{ $key }}, which the operator sets: remove it
{{- end }}
{{- end }}
{{- end }}

{{- define "common.rules.pod" -}}
{{- $all := .values.pods }}{{ $own := get .values .role -}}
{{- include "common.rules.env" . -}}
{{- include "common.rules.volumes" . -}}
{{- range $key, $value := $own.labels -}}
{{- if or (hasPrefix "ray.io/" $key) (has $key (list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "app.kubernetes.io/part-of")) }}
{{ $.role }}.labels sets {{ $key }}, by which pods are selected: choose another name
{{- end }}
{{- end }}
{{- range $key, $value := $own.annotations -}}
{{- if hasPrefix "ray.io/" $key }}
{{ $.role }}.annotations sets {{ $key }}, which the operator sets: remove it
{{- end }}
{{- end }}
{{- end }}

{{- define "common.rules.env" -}}
{{- $own := get .values .role -}}
{{- $operators := list "RAY_DASHBOARD_ADDRESS" "RAY_JOB_SUBMISSION_ID" "PYTHONUNBUFFERED" "RAY_CLUSTER_NAME" "RAY_CLUSTER_NAMESPACE" "RAY_CLOUD_INSTANCE_ID" "RAY_NODE_TYPE_NAME" "FQ_RAY_IP" "RAY_IP" "RAY_PORT" "RAY_ADDRESS" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "KUBERAY_GEN_RAY_START_CMD" "KUBERAY_GEN_AUTOSCALER_START_CMD" -}}
{{- $redis := list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME" -}}
{{- $seen := dict -}}
{{- range $own.env -}}
{{- if hasKey $seen .name }}
{{ $.role }}.env has {{ .name }} {{ 2 }} times, Kubernetes accepts 1: remove one
{{- end }}
{{- $_ := set $seen .name true -}}
{{- if has .name $operators }}
{{ $.role }}.env sets {{ .name }}, which the operator sets: remove it
{{- else if has .name $redis }}
{{ $.role }}.env sets {{ .name }}, which the operator refuses without its fault tolerance: remove it; a job resumes from its output, without Redis
{{- else if eq .name "RAY_enable_autoscaler_v2" }}
{{ $.role }}.env sets RAY_enable_autoscaler_v2, which the operator refuses beside autoscalerOptions.version: use autoscaling.enabled instead
{{- end }}
{{- end }}
{{- end }}

{{- define "common.rules.volumes" -}}
{{- $all := .values.pods }}{{ $own := get .values .role -}}
{{- $joined := eq .role "pods" | ternary (list) $all.volumes -}}
{{- $charts := list "scratch" "shared-memory" "model-cache" "job" }}{{ $taken := dict -}}
{{- range concat $joined $own.volumes -}}
{{- if or (hasKey $taken .name) (has .name $charts) }}
{{ $.role }}.volumes has a second volume {{ .name }}: choose another name (the chart has scratch, shared-memory, model-cache and job)
{{- end }}
{{- $_ := set $taken .name true -}}
{{- end }}
{{- $paths := dict "/tmp" true "/dev/shm" true "/etc/batch-inference" true .values.modelCache.mountPath true -}}
{{- range concat (eq .role "pods" | ternary (list) $all.volumeMounts) $own.volumeMounts -}}
{{- $path := trimSuffix "/" .mountPath -}}
{{- if hasKey $paths $path }}
{{ $.role }}.volumeMounts mounts {{ $path }} a second time: choose another path (the chart mounts /tmp, /dev/shm, /etc/batch-inference and modelCache.mountPath)
{{- end }}
{{- $_ := set $paths $path true -}}
{{- if has .name $charts }}
{{ $.role }}.volumeMounts mounts {{ .name }} at {{ $path }}, a volume of the chart that not every pod has: add one of your own to {{ $.role }}.volumes
{{- else if not (hasKey $taken .name) }}
{{ $.role }}.volumeMounts mounts {{ .name }} at {{ $path }}, but there is no such volume: add it to {{ $.role }}.volumes
{{- end }}
{{- end }}
{{- end }}

{{- define "common.rules.versions" -}}
{{- if has .Values.modelCache.mountPath (list "/tmp" "/dev/shm" "/etc/batch-inference") }}
modelCache.mountPath is {{ .Values.modelCache.mountPath }}, where the chart mounts another volume: choose another path, such as /cache
{{- end }}
{{- if semverCompare "<1.6.0-0" .Values.kuberayVersion }}
kuberayVersion is {{ .Values.kuberayVersion }}, preRunningDeadlineSeconds needs 1.6.0: upgrade the operator
{{- end }}
{{- if and .Values.auth.enabled (semverCompare "<2.52.0-0" .Values.rayVersion) }}
auth.enabled needs Ray 2.52.0, rayVersion is {{ .Values.rayVersion }}: use a newer Ray or auth.enabled=false
{{- end }}
{{- $labels := (default (dict) .Values.run).labels }}{{ $annotations := (default (dict) .Values.run).annotations }}{{ $at := "run" -}}
{{- if .Values.cluster }}{{ $labels = .Values.cluster.labels }}{{ $annotations = .Values.cluster.annotations }}{{ $at = "cluster" }}{{ end -}}
{{- range $key, $value := $annotations -}}
{{- if has $key (list "ray.io/ft-enabled" "ray.io/external-storage-namespace" "ray.io/gcs-ft-deletion-timeout") }}
{{ $at }}.annotations sets {{ $key }}, fault tolerance that the operator refuses or that needs Redis: remove it; a job resumes from its output
{{- else if has $key (list "ray.io/overwrite-container-cmd" "ray.io/disable-provisioned-head-restart" "ray.io/job-submission-mode") }}
{{ $at }}.annotations sets {{ $key }}, which changes how pods start: remove it
{{- end }}
{{- end }}
{{- range $key, $value := $labels -}}
{{- if has $key (list "kueue.x-k8s.io/queue-name" "kueue.x-k8s.io/priority-class") }}
{{ $at }}.labels sets {{ $key }}: use queue.name and queue.priorityClass, which are checked
{{- else if has $key (list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/part-of" "app.kubernetes.io/version" "app.kubernetes.io/managed-by" "helm.sh/chart") }}
{{ $at }}.labels sets {{ $key }}, by which the release is selected: choose another name
{{- end }}
{{- end }}
{{- if and .Values.queue.name .Values.autoscaling.enabled (not .Values.queue.elastic) }}
queue.name is {{ .Values.queue.name }} and autoscaling.enabled is true, but Kueue admits autoscaling only for elastic jobs: set queue.elastic=true or autoscaling.enabled=false
{{- end }}
{{- end }}
