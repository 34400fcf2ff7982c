{{- /* Names and labels, defined once so that templates, rules and notes agree. */}}

{{- define "common.name" -}}
{{- default .Release.Name .Values.nameOverride -}}
{{- end }}

{{- define "common.serviceAccountName" -}}
{{- if .Values.serviceAccount.name }}{{ .Values.serviceAccount.name }}
{{- else if .Values.serviceAccount.create }}{{ include "common.name" . }}
{{- else }}default{{ end -}}
{{- end }}

{{- define "common.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}
{{- else }}{{ $image.repository }}:{{ default .Chart.AppVersion $image.tag }}{{ end -}}
{{- end }}

{{- /*
Labels that select a release's pods. The chart's version is not among them, since it must not change a run. Neither is
app.kubernetes.io/name: the operator sets it, and a job's head service selects by it.
*/}}
{{- define "common.selectorLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/part-of: ray-batch-inference
{{- end }}

{{- define "common.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
{{ include "common.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}
