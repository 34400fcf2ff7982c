{{- /* Values of a RayJob that the operator or Kueue would refuse only after it was created, when no edit can fix it. */}}
{{- define "rayjob.rules" -}}
{{- include "rayjob.rules.name" . -}}
{{- include "rayjob.rules.going" . -}}
{{- include "rayjob.rules.renamed" . -}}
{{- include "rayjob.rules.input" . -}}
{{- include "rayjob.rules.schedule" . -}}
{{- include "rayjob.rules.run" . -}}
{{- include "rayjob.rules.deletion" . -}}
{{- include "rayjob.rules.shared" . -}}
{{- include "rayjob.rules.queue" . -}}
{{- include "common.rules" (dict "root" . "roles" (list "pods" "head" "workers" "cpuWorkers" "submitter") "cluster" (eq .Values.clusterSelector "")) -}}
{{- end }}

{{- define "rayjob.rules.name" -}}
{{- $name := include "common.name" . -}}
{{- if gt (len $name) 38 }}
the name {{ $name }} has {{ len $name }} characters, 38 fit beside the digest of the run: set nameOverride to a shorter one
{{- end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
the name {{ $name }} is not of a-z, 0-9 and -, starting with a letter: set nameOverride
{{- end }}
{{- end }}

{{- /* Helm would treat an object that is being deleted as present, and start nothing. */}}
{{- define "rayjob.rules.going" -}}
{{- $there := lookup "ray.io/v1" "RayJob" .Release.Namespace (include "rayjob.name" .) -}}
{{- if dig "metadata" "deletionTimestamp" "" $there }}
the run {{ $there.metadata.name }} of an earlier release with the same values is being deleted since {{ $there.metadata.deletionTimestamp }}: wait for it (kubectl wait --for=delete rayjob/{{ $there.metadata.name }}), or set run.id
{{- end }}
{{- end }}

{{- /* Keys of earlier versions. The schema lets them pass, since it could not say their new names. */}}
{{- define "rayjob.rules.renamed" -}}
{{- $preprocess := default dict .Values.job.preprocess -}}
{{- $decoders := list -}}
{{- range $old, $decoder := dict "exact" "exact" "gpu_jpeg" "gpu" -}}
{{- if eq (toString (get $preprocess $old)) "true" }}{{ $decoders = append $decoders (printf "job.preprocess.decoder: %s" $decoder) }}{{ end -}}
{{- end -}}
{{- range $old := list "exact" "gpu_jpeg" -}}
{{- if hasKey $preprocess $old }}
job.preprocess.{{ $old }} has a new name: write {{ $decoders | default (list "job.preprocess.decoder: fast") | join " or " }}
{{- end }}
{{- end -}}
{{- range list (list "input" "bytes_column" "image_column") (list "errors" "min_sample" "min_rows") (list "preflight" "golden" "golden_manifest") -}}
{{- $section := default dict (get $.Values.job (index . 0)) -}}
{{- if hasKey $section (index . 1) }}
job.{{ index . 0 }}.{{ index . 1 }} has a new name: write job.{{ index . 0 }}.{{ index . 2 }}: {{ get $section (index . 1) | toRawJson }}
{{- end }}
{{- end -}}
{{- end }}

{{- define "rayjob.rules.schedule" -}}
{{- $time := regexMatch "\\{time(-[0-9]+[dhm])?:%[^}]*\\}" .Values.job.output.uri -}}
{{- if and .Values.schedule.cron (not $time) }}
schedule.cron is {{ .Values.schedule.cron }} and job.output.uri is the same for each run, so all runs but the first would find their job done: put the time into it, such as {{ .Values.job.output.uri | default "s3://bucket/predictions/" | trimSuffix "/" }}/{time:%Y-%m-%d-%H%M}/
{{- end }}
{{- if and (not .Values.schedule.cron) (contains "{time" (include "rayjob.jobYaml" .)) }}
job has a {time:…}, which only runs of a schedule replace: set schedule.cron, or write the time out
{{- end }}
{{- if and .Values.schedule.cron .Values.preflightHook.enabled }}
schedule.cron is {{ .Values.schedule.cron }} and preflightHook.enabled is true, but the output's URI is known only when a run starts: set preflightHook.enabled=false, and job.preflight.enabled=true
{{- end }}
{{- if and .Values.clusterSelector .Values.preflightHook.enabled }}
clusterSelector is {{ .Values.clusterSelector }} and preflightHook.enabled is true, but its pod would request GPUs in addition to that cluster's: set preflightHook.enabled=false, and job.preflight.enabled=true
{{- end }}
{{- if and .Values.schedule.cron .Values.run.suspend }}
schedule.cron is {{ .Values.schedule.cron }} and run.suspend is true, so each run would stay suspended: set schedule.suspend to start none
{{- end }}
{{- end }}

{{- define "rayjob.rules.input" -}}
{{- $job := .Values.job -}}
{{- if not (or $job.input.uris $job.input.manifest) }}
job.input.uris is empty and job.input.manifest is not given: set one of them to the images
{{- end }}
{{- if and $job.input.uris $job.input.manifest }}
job.input.uris and job.input.manifest are both given: keep the one that lists your images
{{- end }}
{{- $output := $job.output.uri -}}
{{- if not $output }}
job.output.uri is empty: set it to the folder for the output, such as s3://bucket/predictions/
{{- else if and (eq (include "rayjob.outputPath" .) "true") (not .Values.clusterSelector) -}}
{{- $lasting := dict -}}
{{- range .Values.pods.volumes }}{{ if not (hasKey . "emptyDir") }}{{ $_ := set $lasting .name true }}{{ end }}{{ end -}}
{{- $mounted := false -}}
{{- range .Values.pods.volumeMounts -}}
{{- if and (hasKey $lasting .name) (hasPrefix (printf "%s/" (trimSuffix "/" .mountPath)) (printf "%s/" (trimPrefix "file://" $output))) }}{{ $mounted = true }}{{ end -}}
{{- end -}}
{{- if not $mounted }}
job.output.uri is {{ $output }}, a path that is lost with the pod: mount a persistent volume there with pods.volumes and pods.volumeMounts, or use s3://, gs:// or az://
{{- end }}
{{- end }}
{{- end }}

{{- /* Whether the output is a path in the Ray pods. */}}
{{- define "rayjob.outputPath" -}}
{{- or (not (contains "://" .Values.job.output.uri)) (hasPrefix "file://" .Values.job.output.uri) -}}
{{- end }}

{{- define "rayjob.rules.run" -}}
{{- $run := .Values.run -}}
{{- if and $run.suspend (not $run.shutdownAfterJobFinishes) }}
run.suspend is true and run.shutdownAfterJobFinishes is false, which the operator refuses: set run.shutdownAfterJobFinishes=true
{{- end }}
{{- if and (gt (int64 $run.ttlSecondsAfterFinished) (int64 0)) (not $run.shutdownAfterJobFinishes) }}
run.ttlSecondsAfterFinished is {{ int64 $run.ttlSecondsAfterFinished }} and run.shutdownAfterJobFinishes is false, so nothing would be deleted then: set run.shutdownAfterJobFinishes=true or run.ttlSecondsAfterFinished=0
{{- end }}
{{- if $run.activeDeadlineSeconds -}}
{{- if ge (int64 $run.preRunningDeadlineSeconds) (int64 $run.activeDeadlineSeconds) }}
run.preRunningDeadlineSeconds is {{ int64 $run.preRunningDeadlineSeconds }}, run.activeDeadlineSeconds is {{ int64 $run.activeDeadlineSeconds }}, so a job that never starts would take all of its time: raise run.activeDeadlineSeconds above it
{{- end }}
{{- if and .Values.autoscaling.enabled (ge (int64 .Values.autoscaling.waitSeconds) (int64 $run.activeDeadlineSeconds)) }}
autoscaling.waitSeconds is {{ int64 .Values.autoscaling.waitSeconds }}, run.activeDeadlineSeconds is {{ int64 $run.activeDeadlineSeconds }}, so a job whose workers never come would take all of its time: raise run.activeDeadlineSeconds above it
{{- end }}
{{- end }}
{{- end }}

{{- define "rayjob.rules.deletion" -}}
{{- $run := .Values.run }}{{ $rules := $run.deletionRules -}}
{{- if and $rules $run.shutdownAfterJobFinishes }}
run.deletionRules has {{ len $rules }} rules and run.shutdownAfterJobFinishes is true, which the operator refuses: set run.shutdownAfterJobFinishes=false
{{- end }}
{{- if and (not $rules) (not $run.shutdownAfterJobFinishes) (not .Values.clusterSelector) }}
run.shutdownAfterJobFinishes is false and run.deletionRules has 0 rules, so the cluster and its GPUs would stay allocated forever: set one of them, or run.ttlSecondsAfterFinished for inspection
{{- end }}
{{- $ttls := dict }}{{ $freed := dict -}}
{{- range $index, $rule := $rules -}}
{{- $at := printf "run.deletionRules[%d]" $index -}}
{{- $status := default $rule.condition.jobDeploymentStatus $rule.condition.jobStatus -}}
{{- $end := ternary "jobStatus" "jobDeploymentStatus" (hasKey $rule.condition "jobStatus") -}}
{{- $key := printf "%s %s" $end $status -}}
{{- if hasKey $ttls (printf "%s %s" $key $rule.policy) }}
{{ $at }} is a second rule for {{ $key }} and {{ $rule.policy }}: remove one
{{- end }}
{{- $_ := set $ttls (printf "%s %s" $key $rule.policy) (int64 (default 0 $rule.condition.ttlSeconds)) -}}
{{- if eq $rule.policy "DeleteCluster" }}{{ $_ := set $freed $key true }}{{ end -}}
{{- if and (eq $rule.policy "DeleteWorkers") $.Values.autoscaling.enabled }}
{{ $at }} has policy DeleteWorkers and autoscaling.enabled is true, which the operator refuses: use DeleteCluster
{{- end }}
{{- if and (ne $rule.policy "DeleteNone") $.Values.clusterSelector }}
{{ $at }} has policy {{ $rule.policy }} and clusterSelector is {{ $.Values.clusterSelector }}, a shared cluster that a job must not delete: remove the rule
{{- end }}
{{- end }}
{{- if and $rules (not .Values.clusterSelector) -}}
{{- range $key := list "jobStatus SUCCEEDED" "jobStatus FAILED" "jobDeploymentStatus Failed" -}}
{{- $workers := get $ttls (printf "%s DeleteWorkers" $key) }}{{ $cluster := get $ttls (printf "%s DeleteCluster" $key) -}}
{{- if not (hasKey $freed $key) }}
run.deletionRules has no DeleteCluster for {{ $key }}, so the cluster and its GPUs would stay allocated: add that rule, or use run.shutdownAfterJobFinishes
{{- else if and (hasKey $ttls (printf "%s DeleteWorkers" $key)) (gt (int64 $workers) (int64 $cluster)) }}
run.deletionRules keeps workers for {{ $workers }} s and the cluster for {{ $cluster }} s after {{ $key }}: workers must not stay longer than the cluster
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "rayjob.rules.shared" -}}
{{- $selector := .Values.clusterSelector -}}
{{- if $selector -}}
{{- $limit := include "rayjob.backoffLimit" . | int64 -}}
{{- if gt $limit (int64 0) }}
run.backoffLimit is {{ $limit }} and clusterSelector is {{ $selector }}, where only 0 is possible: leave run.backoffLimit out
{{- end }}
{{- /* The submitter's limit: it sends the job as one environment variable. */}}
{{- $bytes := len (toJson (include "rayjob.jobYaml" .)) -}}
{{- if gt $bytes 32768 }}
job takes {{ $bytes }} bytes and clusterSelector is {{ $selector }}, to whose pods at most 32768 bytes can be sent: put long lists into files that job.input.manifest and job.model.labels name
{{- end }}
{{- if .Values.run.suspend }}
run.suspend is true and clusterSelector is {{ $selector }}, a cluster that can't be suspended: set run.suspend=false
{{- end }}
{{- if .Values.queue.name }}
queue.name is {{ .Values.queue.name }} and clusterSelector is {{ $selector }}, but Kueue does not count a shared cluster's pods for the job: set the queue in the raycluster release
{{- end }}
{{- end }}
{{- end }}

{{- define "rayjob.rules.queue" -}}
{{- $queue := .Values.queue.name -}}
{{- if $queue -}}
{{- if not .Values.run.shutdownAfterJobFinishes }}
queue.name is {{ $queue }} and run.shutdownAfterJobFinishes is false, which Kueue refuses: set run.shutdownAfterJobFinishes=true without run.deletionRules
{{- end }}
{{- if .Values.run.suspend }}
queue.name is {{ $queue }} and run.suspend is true, but Kueue decides whether a queued job is suspended: set run.suspend=false
{{- end }}
{{- end }}
{{- end }}
