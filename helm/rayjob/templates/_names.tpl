{{- /*
The name of a run contains a digest of what it runs. Other values make another run, the same values are the same run, and no run
is ever edited in place: the operator ignores most edits and breaks on the rest.
*/}}
{{- define "rayjob.digest" -}}
{{- $body := include "rayjob.body" (dict "root" . "name" "RUN") -}}
{{- $job := include "rayjob.jobYaml" . -}}
{{- printf "%s\n%s\n%s\n%s" .Release.Name .Values.run.id $body $job | sha256sum | trunc 8 -}}
{{- end }}

{{- define "rayjob.name" -}}
{{ include "common.name" . }}-{{ include "rayjob.digest" . }}
{{- end }}

{{- define "rayjob.jobYaml" -}}
{{ toYaml .Values.job }}
{{- end }}

{{- /* The port of the job's own endpoint, as a list. */}}
{{- define "rayjob.storePorts" -}}
{{- $ports := list -}}
{{- with dig "storage" "endpoint_url" "" .Values.job -}}
{{- $port := regexReplaceAll "^https?://(\\[[^]]*\\]|[^:/]*):?([0-9]*).*$" . "${2}" -}}
{{- $ports = list (default (ternary 80 443 (hasPrefix "http:" .)) $port | int64) -}}
{{- end -}}
{{- toJson $ports -}}
{{- end }}

{{- define "rayjob.submitterServiceAccountName" -}}
{{ include "common.name" . }}-submitter
{{- end }}

{{- /* Retries are possible only on a cluster of the job's own. */}}
{{- define "rayjob.backoffLimit" -}}
{{- $limit := .Values.run.backoffLimit -}}
{{- if kindIs "invalid" $limit }}{{ ternary 0 1 (ne .Values.clusterSelector "") }}{{ else }}{{ int64 $limit }}{{ end -}}
{{- end }}
