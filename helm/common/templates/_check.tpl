{{- /*
Refuses values that would fail later or waste GPUs: all problems at once, one per line.
A rule prints nothing if it is kept, else one line with the problem, both numbers, and the remedy.
*/}}
{{- define "common.check" -}}
{{- $problems := list -}}
{{- range splitList "\n" . -}}
{{- $line := trim . -}}
{{- if $line }}{{ $problems = append $problems $line }}{{ end -}}
{{- end -}}
{{- if $problems -}}
{{- fail (printf "\n\n%d %s in the values:\n  - %s\n" (len $problems) (ternary "problem" "problems" (eq (len $problems) 1)) (join "\n  - " $problems)) -}}
{{- end -}}
{{- end }}

{{- /* The rules of both charts: dict root roles cluster. */}}
{{- define "common.rules" -}}
{{- $root := .root -}}
{{- include "common.rules.versions" $root }}
{{- include "common.rules.monitoring" (dict "monitoring" $root.Values.monitoring "cluster" .cluster) }}
{{- if .cluster }}
{{- include "common.rules.capacity" $root }}
{{- end }}
{{- range .roles }}
{{- include "common.rules.pod" (dict "values" $root.Values "role" .) }}
{{- end }}
{{- include "common.rules.kueue" . }}
{{- range list "head" "workers" "cpuWorkers" }}
{{- include "common.rules.rayStartParams" (dict "role" . "params" (get $root.Values .).rayStartParams) }}
{{- end }}
{{- end }}
