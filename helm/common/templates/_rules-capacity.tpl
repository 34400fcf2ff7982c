{{- /*
Sizes that Ray would accept without a word: actors that fit nowhere wait forever, and their GPUs cost money meanwhile.
One line per problem: the problem, both numbers, the remedy. job/batch_inference/kubernetes/capacity.py has the same messages.
*/}}
{{- define "common.rules.capacity" -}}
{{- $capacity := fromJson (include "common.capacity" .) -}}
{{- $demand := $capacity.demand -}}
{{- $keys := dict "gpusPerActor" "actorPool.gpusPerActor" "cpusPerActor" "actorPool.cpusPerActor" "cpusPerTask" "actorPool.cpusPerTask" -}}
{{- if .Values.job -}}
{{- $keys = dict "gpusPerActor" "job.inference.gpus_per_actor" "cpusPerActor" "job.inference.cpus_per_actor" "cpusPerTask" "job.preprocess.cpus_per_task" -}}
{{- end -}}
{{- $pool := fromJson (include "common.pool" .) -}}
{{- range list "gpusPerActor" "cpusPerActor" "cpusPerTask" -}}
{{- include "common.rules.step" (dict "key" (get $keys .) "given" (get $pool .)) -}}
{{- end -}}
{{- include "common.rules.gpus" (dict "demand" $demand "workers" .Values.workers "keys" $keys) -}}
{{- include "common.rules.cpus" (dict "capacity" $capacity "keys" $keys) -}}
{{- range $name := list "workers" "cpuWorkers" -}}
{{- include "common.rules.memory" (dict "name" $name "size" (get $capacity $name)) -}}
{{- end -}}
{{- include "common.rules.store" (dict "name" "head" "size" $capacity.head) -}}
{{- include "common.rules.autoscaling" (dict "autoscaling" .Values.autoscaling "replicas" $capacity.workers.replicas) -}}
{{- end }}

{{- define "common.rules.step" -}}
{{- $units := include "common.units" (list .given 10000) | int64 -}}
{{- if ne (mulf (float64 .given) 10000.0) (float64 $units) }}
{{ .key }} is {{ include "common.shown" (list .given 1) }}, Ray counts in steps of 0.0001: use {{ include "common.shown" (list (max 1 $units) 10000) }}
{{- end }}
{{- end }}

{{- define "common.rules.gpus" -}}
{{- $actorGpus := int64 .demand.actorGpus -}}
{{- $gpus := int64 .workers.gpusPerWorker -}}
{{- $shown := include "common.shown" (list $actorGpus 10000) -}}
{{- if and (gt $actorGpus 10000) (mod $actorGpus 10000) }}
{{ .keys.gpusPerActor }} is {{ $shown }}, which is neither a fraction of one GPU nor a whole number of GPUs; Ray schedules only those: use {{ div $actorGpus 10000 }} or {{ add 1 (div $actorGpus 10000) }}
{{- else if gt $actorGpus (mul $gpus 10000) }}
{{ .keys.gpusPerActor }} is {{ $shown }}, workers.gpusPerWorker is {{ $gpus }}: no worker can hold an actor; raise workers.gpusPerWorker to {{ $shown }} or lower {{ .keys.gpusPerActor }} to {{ $gpus }}
{{- else if and (ge $actorGpus 10000) (mod (mul $gpus 10000) $actorGpus) }}
{{ .keys.gpusPerActor }} is {{ $shown }}, workers.gpusPerWorker is {{ $gpus }}: {{ div (mod (mul $gpus 10000) $actorGpus) 10000 }} GPUs of each worker would be paid for and idle; make workers.gpusPerWorker a multiple of {{ $shown }}
{{- end }}
{{- end }}

{{- define "common.rules.cpus" -}}
{{- $workers := .capacity.workers }}{{ $cpuWorkers := .capacity.cpuWorkers -}}
{{- $taskCpus := int64 .capacity.demand.taskCpus -}}
{{- $spare := int64 $workers.spareCpus -}}
{{- if lt $spare (int64 0) }}
workers.cpus is {{ int64 $workers.cpus }}, its {{ int64 $workers.actors }} actors need {{ include "common.shown" (list (sub (mul 10000 (int64 $workers.cpus)) $spare) 10000) }}: raise workers.cpus or lower {{ .keys.cpusPerActor }}
{{- end }}
{{- $maxSpare := max 0 $spare -}}
{{- if gt (int64 $cpuWorkers.replicas) (int64 0) }}{{ $maxSpare = max $maxSpare (int64 $cpuWorkers.spareCpus) }}{{ end -}}
{{- if and (gt (int64 $cpuWorkers.replicas) (int64 0)) (gt $taskCpus (int64 $cpuWorkers.spareCpus)) }}
{{ .keys.cpusPerTask }} is {{ include "common.shown" (list $taskCpus 10000) }}, cpuWorkers.cpus is {{ int64 $cpuWorkers.cpus }}: CPU workers would never run a task; raise cpuWorkers.cpus or lower {{ .keys.cpusPerTask }}
{{- end }}
{{- if gt $taskCpus $maxSpare }}
{{ .keys.cpusPerTask }} is {{ include "common.shown" (list $taskCpus 10000) }}, no worker has more than {{ include "common.shown" (list $maxSpare 10000) }} CPUs beside its actors: no image would ever be prepared; raise workers.tasksPerWorker, workers.cpus or cpuWorkers.replicas
{{- end }}
{{- end }}

{{- define "common.rules.memory" -}}
{{- $size := .size -}}
{{- $need := add (int64 $size.heapMiB) (int64 $size.objectStoreMiB) -}}
{{- if and (gt (int64 $size.replicas) (int64 0)) (gt $need (int64 $size.memoryMiB)) }}
{{ .name }}.memoryGiB is {{ include "common.shown" (list $size.memoryMiB 1024) }}, {{ int64 $size.actors }} actors, {{ int64 $size.tasks }} tasks and the object store need {{ include "common.shown" (list $need 1024) }}: raise {{ .name }}.memoryGiB or lower {{ .name }}.objectStorePercent
{{- end }}
{{- if gt (int64 $size.replicas) (int64 0) }}{{ include "common.rules.store" . }}{{ end -}}
{{- end }}

{{- define "common.rules.store" -}}
{{- if lt (int64 .size.objectStoreMiB) (int64 80) }}
{{ .name }} has {{ int64 .size.objectStoreMiB }} MiB of object store, Ray starts with no less than 80: raise {{ .name }}.memoryGiB or {{ .name }}.objectStorePercent
{{- end }}
{{- end }}

{{- define "common.rules.autoscaling" -}}
{{- if and .autoscaling.enabled (gt (int64 .autoscaling.minWorkers) (int64 .replicas)) }}
autoscaling.minWorkers is {{ int64 .autoscaling.minWorkers }}, the actor pool needs {{ int64 .replicas }} workers: lower autoscaling.minWorkers to {{ int64 .replicas }} or less
{{- end }}
{{- end }}
