{{- /*
Malformed labels and annotations of Kueue's, which its webhooks refuse when an object is created, even outside a queue.
Takes dict root roles.
*/}}
{{- define "common.rules.kueue" -}}
{{- $values := .root.Values -}}
{{- $at := ternary "cluster" "run" (hasKey $values "cluster") }}{{ $own := get $values $at -}}
{{- range $kind := list "labels" "annotations" -}}
{{- if hasKey (get $own $kind) "kueue.x-k8s.io/prebuilt-workload-name" }}
{{ $at }}.{{ $kind }} sets kueue.x-k8s.io/prebuilt-workload-name, but Kueue counts what this chart computes: remove it
{{- end }}
{{- end }}
{{- with get $own.labels "kueue.x-k8s.io/max-exec-time-seconds" -}}
{{- if not (regexMatch "^[1-9][0-9]{0,8}$" .) }}
{{ $at }}.labels sets kueue.x-k8s.io/max-exec-time-seconds to {{ . }}, Kueue accepts whole seconds above 0: correct it
{{- end }}
{{- end }}
{{- with get $own.annotations "kueue.x-k8s.io/admission-gated-by" -}}
{{- $gates := list }}{{ range splitList "," . }}{{ $gates = append $gates (trim .) }}{{ end -}}
{{- $wrong := ne (len $gates) (len (uniq $gates)) -}}
{{- range $gates -}}
{{- if not (and (le (len .) 63) (regexMatch "^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[-A-Za-z0-9/%:@._~!$&'()*+,;=]+$" .)) }}{{ $wrong = true }}{{ end -}}
{{- end -}}
{{- if $wrong }}
{{ $at }}.annotations sets kueue.x-k8s.io/admission-gated-by to {{ . }}, Kueue accepts distinct names such as example.com/gate, separated by commas: correct it
{{- end }}
{{- end }}
{{- range $role := .roles -}}
{{- if ne $role "pods" -}}
{{- $annotations := (fromJson (include "common.both" (dict "root" $.root "role" $role "key" "annotations"))).it -}}
{{- include "common.rules.topology" (dict "role" $role "annotations" $annotations) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- /* The topology by which Kueue places a role's pods. */}}
{{- define "common.rules.topology" -}}
{{- $topologies := list }}{{ $role := .role }}{{ $annotations := .annotations -}}
{{- range list "required" "preferred" "unconstrained" -}}
{{- if hasKey $annotations (printf "kueue.x-k8s.io/podset-%s-topology" .) }}{{ $topologies = append $topologies . }}{{ end -}}
{{- end -}}
{{- if gt (len $topologies) 1 }}
{{ $role }}.annotations (with those of pods) ask Kueue for {{ len $topologies }} topologies, {{ join " and " $topologies }}, it accepts 1: remove the others
{{- end }}
{{- range list "required" "preferred" -}}
{{- $key := printf "kueue.x-k8s.io/podset-%s-topology" . -}}
{{- if and (hasKey $annotations $key) (not (regexMatch "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$" (get $annotations $key))) }}
{{ $role }}.annotations sets {{ $key }} to {{ get $annotations $key | quote }}, which is not a valid node label: use one such as topology.kubernetes.io/zone
{{- end }}
{{- end }}
{{- with get $annotations "kueue.x-k8s.io/podset-unconstrained-topology" -}}
{{- if not (has . (list "true" "false")) }}
{{ $role }}.annotations sets kueue.x-k8s.io/podset-unconstrained-topology to {{ . }}, it accepts "true" or "false": correct it
{{- end }}
{{- end }}
{{- range list "podset-group-name" "podset-slice-required-topology" "podset-slice-size" "podset-slice-required-topology-constraints" -}}
{{- if hasKey $annotations (printf "kueue.x-k8s.io/%s" .) }}
{{ $role }}.annotations sets kueue.x-k8s.io/{{ . }}, but the pods of a job are not in groups or slices: use kueue.x-k8s.io/podset-required-topology or -preferred-topology
{{- end }}
{{- end }}
{{- end }}
