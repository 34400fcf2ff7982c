{{- /*
The size of the cluster: the number of workers, and what each of them has, computed from the actor pool.
The result is JSON. fromJson makes all of its numbers floats, so they need int64 before they are written. _rules-capacity.tpl checks it.
*/}}

{{- /* The actor pool: that of the job, or of the values of a shared cluster. */}}
{{- define "common.pool" -}}
{{- if .Values.job -}}
{{- $inference := .Values.job.inference -}}
{{- dict "actors" $inference.actors "gpusPerActor" $inference.gpus_per_actor "cpusPerActor" $inference.cpus_per_actor "cpusPerTask" .Values.job.preprocess.cpus_per_task | toJson -}}
{{- else -}}
{{- toJson .Values.actorPool -}}
{{- end -}}
{{- end }}

{{- /* The actor pool in small units. */}}
{{- define "common.demand" -}}
{{- $pool := fromJson (include "common.pool" .) -}}
{{- dict
  "actors" (int64 $pool.actors)
  "actorGpus" (include "common.units" (list $pool.gpusPerActor 10000) | int64)
  "actorCpus" (include "common.units" (list $pool.cpusPerActor 10000) | int64)
  "taskCpus" (include "common.units" (list $pool.cpusPerTask 10000) | int64)
  | toJson -}}
{{- end }}

{{- /* Actors that fit into one worker. A fraction is of a single GPU, so 0.6 does not fit three times into two. */}}
{{- define "common.actorsPerWorker" -}}
{{- $actorGpus := int64 .demand.actorGpus -}}
{{- $gpus := int64 .workers.gpusPerWorker -}}
{{- if eq $actorGpus 0 }}{{ .workers.actorsPerWorker | int64 }}
{{- else if lt $actorGpus 10000 }}{{ mul $gpus (div 10000 $actorGpus) }}
{{- else }}{{ div (mul $gpus 10000) $actorGpus }}{{ end -}}
{{- end }}

{{- /* CPUs, tasks, memory and object store of one pod of a group: dict group demand actors. */}}
{{- define "common.podSize" -}}
{{- $group := .group -}}
{{- $taskCpus := int64 .demand.taskCpus -}}
{{- $actorCpus := mul (int64 .actors) (int64 .demand.actorCpus) -}}
{{- $cpus := include "common.ceil" (list (add $actorCpus (mul (int64 $group.tasksPerWorker) $taskCpus)) 10000) | int64 -}}
{{- if $group.cpus }}{{ $cpus = int64 $group.cpus }}{{ end -}}
{{- $spare := sub (mul $cpus 10000) $actorCpus -}}
{{- $tasks := ternary (div $spare (max 1 $taskCpus)) 0 (gt $spare (int64 0)) -}}
{{- $actorMemory := include "common.units" (list (default 0 $group.actorMemoryGiB) 1024) | int64 -}}
{{- $taskMemory := include "common.units" (list $group.taskMemoryGiB 1024) | int64 -}}
{{- $heap := add (mul (int64 .actors) $actorMemory) (mul $tasks $taskMemory) -}}
{{- $percent := int64 $group.objectStorePercent -}}
{{- $memory := mul 1024 (include "common.ceil" (list (mul $heap 100) (mul 1024 (sub 100 $percent))) | int64) -}}
{{- if $group.memoryGiB }}{{ $memory = include "common.units" (list $group.memoryGiB 1024) | int64 }}{{ end -}}
{{- $memory = max 1024 $memory -}}
{{- $store := div (mul $memory $percent) 100 -}}
{{- dict "actors" (int64 .actors) "cpus" $cpus "spareCpus" $spare "tasks" $tasks "heapMiB" $heap "memoryMiB" $memory "objectStoreMiB" $store | toJson -}}
{{- end }}

{{- define "common.capacity" -}}
{{- $demand := fromJson (include "common.demand" .) -}}
{{- $workers := .Values.workers -}}
{{- $actorsPerWorker := include "common.actorsPerWorker" (dict "demand" $demand "workers" $workers) | int64 -}}
{{- $size := fromJson (include "common.podSize" (dict "group" $workers "demand" $demand "actors" $actorsPerWorker)) -}}
{{- $_ := set $size "replicas" (include "common.ceil" (list $demand.actors (max 1 $actorsPerWorker)) | int64) -}}
{{- $_ := set $size "gpus" (ternary 0 (int64 $workers.gpusPerWorker) (eq (int64 $demand.actorGpus) (int64 0))) -}}
{{- $cpuSize := fromJson (include "common.podSize" (dict "group" .Values.cpuWorkers "demand" $demand "actors" 0)) -}}
{{- $_ := set $cpuSize "replicas" (int64 .Values.cpuWorkers.replicas) -}}
{{- $head := .Values.head -}}
{{- $headMemory := include "common.units" (list $head.memoryGiB 1024) | int64 -}}
{{- $headSize := dict "memoryMiB" $headMemory "objectStoreMiB" (div (mul $headMemory (int64 $head.objectStorePercent)) 100) -}}
{{- dict "demand" $demand "workers" $size "cpuWorkers" $cpuSize "head" $headSize | toJson -}}
{{- end }}

{{- /* A number with its noun: list NUMBER NOUN. */}}
{{- define "common.count" -}}
{{ int64 (index . 0) }} {{ index . 1 }}{{ if ne (int64 (index . 0)) 1 }}s{{ end }}
{{- end }}

{{- /* The pods of a cluster as a sentence, for the notes. */}}
{{- define "common.capacityInWords" -}}
{{- $capacity := fromJson (include "common.capacity" .) -}}
a head without tasks, {{ include "common.count" (list $capacity.workers.replicas "worker") }} of {{ include "common.count" (list $capacity.workers.gpus "GPU") }} and {{ include "common.count" (list $capacity.workers.cpus "CPU") }}
{{- if $capacity.cpuWorkers.replicas }}, {{ include "common.count" (list $capacity.cpuWorkers.replicas "CPU worker") }}{{ end }}.
{{- end }}
