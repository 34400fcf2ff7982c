{{- /*
Everything of the RayJob that identifies a run; the digest of it is part of the run's name.
Takes dict root name; the name is a placeholder while the digest is computed.
*/}}
{{- define "rayjob.body" -}}
{{- $values := .root.Values -}}
{{- with (include "rayjob.runLabels" .root) }}
labels:
  {{- . | nindent 2 }}
{{- end }}
{{- with (include "rayjob.runAnnotations" .root) }}
annotations:
  {{- . | nindent 2 }}
{{- end }}
spec:
  submissionMode: K8sJobMode
  {{- /* For people who read the RayJob: the operator does not run it. The submitter below sends the same command to Ray. */}}
  entrypoint: batch-inference run --config {{ ternary "/etc/batch-inference/job.yaml" "env:BATCH_INFERENCE_CONFIG" (eq $values.clusterSelector "") }} --address auto --dashboard-host none --log-format json
  shutdownAfterJobFinishes: {{ $values.run.shutdownAfterJobFinishes }}
  ttlSecondsAfterFinished: {{ int64 $values.run.ttlSecondsAfterFinished }}
  backoffLimit: {{ include "rayjob.backoffLimit" .root }}
  preRunningDeadlineSeconds: {{ int64 $values.run.preRunningDeadlineSeconds }}
  {{- with $values.run.activeDeadlineSeconds }}
  activeDeadlineSeconds: {{ int64 . }}
  {{- end }}
  {{- /* With a queue, Kueue suspends and resumes: a value here would overrule it. */}}
  {{- if $values.run.suspend }}
  suspend: true
  {{- end }}
  {{- with $values.run.deletionRules }}
  deletionStrategy:
    deletionRules:
      {{- toYaml . | nindent 6 }}
  {{- end }}
  submitterConfig:
    backoffLimit: {{ int64 $values.submitter.backoffLimit }}
  submitterPodTemplate:
    {{- include "rayjob.submitter" . | nindent 4 }}
  {{- if $values.clusterSelector }}
  clusterSelector:
    ray.io/cluster: {{ $values.clusterSelector | quote }}
  {{- else }}
  rayClusterSpec:
    {{- include "common.cluster" (dict "root" .root "job" .name) | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "rayjob.runLabels" -}}
{{- with .Values.queue }}{{ if .name -}}
kueue.x-k8s.io/queue-name: {{ .name | quote }}
{{- with .priorityClass }}
kueue.x-k8s.io/priority-class: {{ . | quote }}
{{- end }}
{{ end }}{{ end -}}
{{- with .Values.run.labels }}{{ toYaml . }}{{ end -}}
{{- end }}

{{- define "rayjob.runAnnotations" -}}
{{- if and .Values.queue.name .Values.queue.elastic -}}
kueue.x-k8s.io/elastic-job: "true"
{{ end -}}
{{- with .Values.run.annotations }}{{ toYaml . }}{{ end -}}
{{- end }}

{{- /*
Our own submitter: KubeRay's fails a running job when its log connection breaks, and passes the entrypoint to a shell.
The operator adds RAY_DASHBOARD_ADDRESS and RAY_JOB_SUBMISSION_ID. A shared cluster does not mount the job, so it is sent with the request.
*/}}
{{- define "rayjob.submitter" -}}
{{- $context := merge (dict "role" "submitter") . -}}
metadata:
  {{- include "common.podMetadata" $context | nindent 2 }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "rayjob.submitterServiceAccountName" .root }}
  automountServiceAccountToken: false
  {{- include "common.podSettings" $context | nindent 2 }}
  containers:
    - name: ray-job-submitter
      {{- include "common.containerImage" .root | nindent 6 }}
      securityContext:
        {{- include "common.containerSecurityContext" . | nindent 8 }}
      command: [batch-inference, submit]
      args:
        - --config
        - /etc/batch-inference/job.yaml
        {{- if .root.Values.clusterSelector }}
        - --inline
        {{- end }}
      env:
        {{- /* By the run's name a retry recognizes itself, and ends within seconds after an error that a retry cannot fix. */}}
        {{- $own := list (dict "name" "HOME" "value" "/tmp") (dict "name" "BATCH_INFERENCE_RUN" "value" .name) }}
        {{- include "common.env" (merge (dict "defaults" $own) $context) | nindent 8 }}
      {{- include "common.envFrom" $context | nindent 6 }}
      resources:
        requests:
          cpu: {{ int64 .root.Values.submitter.cpuMillis }}m
          memory: {{ int64 .root.Values.submitter.memoryMiB }}Mi
        limits:
          memory: {{ int64 .root.Values.submitter.memoryMiB }}Mi
      volumeMounts:
        - name: scratch
          mountPath: /tmp
        - name: job
          mountPath: /etc/batch-inference
          readOnly: true
        {{- with (fromJson (include "common.both" (dict "root" .root "role" "submitter" "key" "volumeMounts"))).it }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: scratch
      emptyDir:
        sizeLimit: 1Gi
    - name: job
      configMap:
        name: {{ .name }}
    {{- with (fromJson (include "common.both" (dict "root" .root "role" "submitter" "key" "volumes"))).it }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
