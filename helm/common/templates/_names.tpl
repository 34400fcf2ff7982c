{{- /* Names and labels, in one place so that templates, rules and notes cannot disagree. */}}

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

{{- /* What objects and pods are found by. The version of the chart is not among them: it must not change a run. */}}
{{- /* Of pods. Their app.kubernetes.io/name is the operator's: a job's head service selects by it. */}}
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
