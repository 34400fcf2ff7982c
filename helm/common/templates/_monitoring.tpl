{{- /* Objects for Prometheus and Grafana. ../../../k8s/monitoring.md lists the metrics and says what to do at each alert. */}}

{{- define "common.rules.monitoring" -}}
{{- $monitoring := .monitoring -}}
{{- if not .cluster -}}
{{- if $monitoring.podMonitor.enabled }}
monitoring.podMonitor.enabled is true and clusterSelector is set, so the release has no Ray pods to scrape: set it in the raycluster release
{{- end }}
{{- if $monitoring.rules.enabled }}
monitoring.rules.enabled is true and clusterSelector is set, so the alerts would have no metrics: set it in the raycluster release, whose alerts name the run
{{- end }}
{{- else if and $monitoring.rules.enabled (not $monitoring.podMonitor.enabled) }}
monitoring.rules.enabled is true and monitoring.podMonitor.enabled is false, so the alerts would have no metrics: set monitoring.podMonitor.enabled=true
{{- end }}
{{- end }}

{{- define "common.podMonitor" -}}
{{- if .Values.monitoring.podMonitor.enabled }}
---
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata:
  name: {{ include "common.name" . | quote }}
  namespace: {{ .Release.Namespace | quote }}
  labels:
    {{- include "common.monitoringLabels" (dict "root" . "labels" .Values.monitoring.podMonitor.labels) | nindent 4 }}
spec:
  selector:
    matchLabels:
      {{- include "common.selectorLabels" . | nindent 6 }}
      ray.io/is-ray-node: "yes"
  {{- /* The alerts select the release's pods by the first of them. */}}
  podTargetLabels: [app.kubernetes.io/instance, ray.io/cluster, ray.io/node-type]
  podMetricsEndpoints:
    - port: metrics
      path: /metrics
      interval: {{ int64 .Values.monitoring.podMonitor.intervalSeconds }}s
{{- end }}
{{- end }}

{{- define "common.monitoringLabels" -}}
{{- toYaml (merge (fromYaml (include "common.labels" .root)) .labels) -}}
{{- end }}

{{- /*
Alerts for one release. Takes dict root pending; pending has the operator's metric and selector for runs that wait for pods.
All expressions are grouped by run, since a release has several.
*/}}
{{- define "common.alerts" -}}
{{- $rules := .root.Values.monitoring.rules -}}
{{- if $rules.enabled }}
{{- $namespace := .root.Release.Namespace -}}
{{- $mine := printf "namespace=%q, app_kubernetes_io_instance=%q" $namespace .root.Release.Name -}}
{{- $left := printf "sum by (namespace, run) (ray_batch_inference_inputs{%s, state=\"left\"}) > 0" $mine -}}
{{- $by := "sum by (namespace, run)" }}
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {{ include "common.name" .root | quote }}
  namespace: {{ $namespace | quote }}
  labels:
    {{- include "common.monitoringLabels" (dict "root" .root "labels" $rules.labels) | nindent 4 }}
spec:
  groups:
    - name: batch-inference-{{ include "common.name" .root }}
      rules:
        - alert: BatchInferenceNoProgress
          expr: |-
            {{ $by }} (increase(ray_batch_inference_images_total{ {{- $mine -}} }[5m])) == 0
              and {{ $left }}
          for: {{ int64 $rules.noProgressMinutes }}m
          labels: {severity: critical}
          annotations:
            summary: No row of run {{ "{{ $labels.run }}" }} has come back for {{ int64 $rules.noProgressMinutes }} minutes, though inputs are left
            runbook_url: {{ printf "%s#batchinferencenoprogress" $rules.runbookUrl | quote }}
        - alert: BatchInferenceErrorRate
          expr: |-
            100 * {{ $by }} (increase(ray_batch_inference_images_total{ {{- $mine }}, outcome="error"}[10m]))
              / {{ $by }} (increase(ray_batch_inference_images_total{ {{- $mine -}} }[10m])) > {{ $rules.errorPercent }}
              and {{ $by }} (increase(ray_batch_inference_images_total{ {{- $mine -}} }[10m])) >= 100
          for: 2m
          labels: {severity: warning}
          annotations:
            summary: Of the rows of run {{ "{{ $labels.run }}" }} in the last ten minutes {{ "{{ $value | printf \"%.1f\" }}" }} % failed
            runbook_url: {{ printf "%s#batchinferenceerrorrate" $rules.runbookUrl | quote }}
        - alert: BatchInferenceGpuIdle
          expr: |-
            100 * {{ $by }} (rate(ray_batch_inference_actor_busy_seconds_total{ {{- $mine }}, device="gpu"}[5m]))
              / {{ $by }} (ray_batch_inference_actors{ {{- $mine }}, state="ready"}) < {{ $rules.gpuBusyPercent }}
              and {{ $left }}
          for: 15m
          labels: {severity: warning}
          annotations:
            summary: The GPUs of run {{ "{{ $labels.run }}" }} are busy {{ "{{ $value | printf \"%.0f\" }}" }} % of the time, though inputs are left
            runbook_url: {{ printf "%s#batchinferencegpuidle" $rules.runbookUrl | quote }}
        - alert: BatchInferenceActorsMissing
          expr: |-
            {{ $by }} (ray_batch_inference_actors{ {{- $mine }}, state="wanted"})
              - {{ $by }} (ray_batch_inference_actors{ {{- $mine }}, state="ready"}) > 0
              and {{ $left }}
          for: {{ int64 $rules.pendingMinutes }}m
          labels: {severity: warning}
          annotations:
            summary: "{{ "{{ $value }}" }} actors of run {{ "{{ $labels.run }}" }} have been missing for {{ int64 $rules.pendingMinutes }} minutes: pods are pending, or the model does not load"
            runbook_url: {{ printf "%s#batchinferenceactorsmissing" $rules.runbookUrl | quote }}
        {{- with .pending }}
        - alert: BatchInferencePodsPending
          {{- /* If the operator is scraped without honorLabels, Prometheus renames its label. */}}
          expr: |-
            max by (run) (label_replace(
              {{ .metric }}{ {{- .selector }}, namespace={{ $namespace | quote -}} }
              or {{ .metric }}{ {{- .selector }}, exported_namespace={{ $namespace | quote -}} },
              "run", "$1", "name", "(.*)")) == 1
          for: {{ int64 $rules.pendingMinutes }}m
          labels: {severity: warning, namespace: {{ $namespace | quote }}}
          annotations:
            summary: "{{ "{{ $labels.run }}" }} has waited {{ int64 $rules.pendingMinutes }} minutes for its pods"
            runbook_url: {{ printf "%s#batchinferencepodspending" $rules.runbookUrl | quote }}
        {{- end }}
        - alert: BatchInferenceRetryLoop
          expr: |-
            (
              {{ $by }} (increase(ray_batch_inference_retries_total{ {{- $mine }}, kind=~"actor|task"}[30m])) >= 5
              and {{ $by }} (increase(ray_batch_inference_commits_total{ {{- $mine -}} }[30m])) == 0
            )
            or (
              {{ $by }} (max_over_time(ray_batch_inference_attempts_total{ {{- $mine -}} }[2h])) >= 3
              and {{ $by }} (last_over_time(ray_batch_inference_inputs{ {{- $mine }}, state="left"}[15m])) > 0
            )
          labels: {severity: critical}
          annotations:
            summary: Run {{ "{{ $labels.run }}" }} is begun again and again ({{ "{{ $value | printf \"%.0f\" }}" }} times)
            runbook_url: {{ printf "%s#batchinferenceretryloop" $rules.runbookUrl | quote }}
{{- end }}
{{- end }}

{{- define "common.dashboard" -}}
{{- if .Values.monitoring.dashboard.enabled }}
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ include "common.name" . }}-dashboard
  namespace: {{ .Release.Namespace | quote }}
  labels:
    {{- include "common.monitoringLabels" (dict "root" . "labels" .Values.monitoring.dashboard.labels) | nindent 4 }}
data:
  batch-inference.json: |-
    {{- .Files.Get "files/dashboard.json" | trim | nindent 4 }}
{{- end }}
{{- end }}
