{{- /* Names of the release's other runs that stay: those that have not ended, and of the others the newest. */}}
{{- define "rayjob.earlierRuns" -}}
{{- $current := include "rayjob.name" . }}{{ $ended := list -}}
{{- range (lookup "ray.io/v1" "RayJob" .Release.Namespace "").items -}}
{{- $status := dig "status" "jobDeploymentStatus" "" . -}}
{{- $mine := eq (dig "metadata" "labels" "app.kubernetes.io/instance" "" .) $.Release.Name -}}
{{- if and $mine (ne .metadata.name $current) -}}
{{- if has $status (list "Complete" "Failed" "ValidationFailed") -}}
{{- $ended = append $ended (printf "%s %s" .metadata.creationTimestamp .metadata.name) -}}
{{- else }}
{{ .metadata.name }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $index, $run := reverse (sortAlpha $ended) -}}
{{- if lt $index (int $.Values.run.history) }}
{{ splitList " " $run | last }}
{{- end -}}
{{- end -}}
{{- end }}

{{- /* Name, labels and annotations, without what Helm writes itself. */}}
{{- define "rayjob.earlierMetadata" -}}
name: {{ .name | quote }}
namespace: {{ .namespace | quote }}
labels:
  {{- toYaml .labels | nindent 2 }}
{{- with omit (default (dict) .annotations) "meta.helm.sh/release-name" "meta.helm.sh/release-namespace" }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
