{{- /* Values of a RayCluster that the operator or Kueue would refuse only after it was created. */}}
{{- define "raycluster.rules" -}}
{{- $name := include "common.name" . -}}
{{- if gt (len $name) 50 }}
the name {{ $name }} has {{ len $name }} characters, the operator cuts names longer than 50: set nameOverride to a shorter one
{{- end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
the name {{ $name }} is not of a-z, 0-9 and -, starting with a letter: set nameOverride
{{- end }}
{{- if and .Values.queue.name .Values.cluster.suspend }}
queue.name is {{ .Values.queue.name }} and cluster.suspend is true, but Kueue decides whether a queued cluster is suspended: set cluster.suspend=false
{{- end }}
{{ include "common.rules" (dict "root" . "roles" (list "pods" "head" "workers" "cpuWorkers") "cluster" true) -}}
{{- end }}
