{{- /*
One pod, whatever its role. Every pod passes Pod Security "restricted"; what writes, writes to volumes.
Values come as dict root role, where role is the key of the values (head, workers, cpuWorkers, submitter).
*/}}

{{- /*
What a role says itself. The submitter goes where the head goes unless it says otherwise: both belong on CPU nodes that stay, and
the operator waits for a submitter that finds no node as long as for a job.
*/}}
{{- define "common.own" -}}
{{- $own := get (get .root.Values .role) .key -}}
{{- if and (eq .role "submitter") (not $own) (has .key (list "nodeSelector" "tolerations" "affinity" "priorityClassName")) -}}
{{- $own = get .root.Values.head .key -}}
{{- end -}}
{{- toJson (dict "it" $own) -}}
{{- end }}

{{- /* A setting of the role, or of all pods where the role has none. */}}
{{- define "common.either" -}}
{{- $own := (fromJson (include "common.own" .)).it -}}
{{- $all := get .root.Values.pods .key -}}
{{- toJson (dict "it" (default $all $own)) -}}
{{- end }}

{{- /* What all pods have and what the role adds: maps merged, the role's winning, and lists joined. */}}
{{- define "common.both" -}}
{{- $own := (fromJson (include "common.own" .)).it -}}
{{- $all := get .root.Values.pods .key -}}
{{- if kindIs "map" $all -}}
{{- toJson (dict "it" (merge (deepCopy $own) $all)) -}}
{{- else -}}
{{- toJson (dict "it" (default (list) (concat $all $own))) -}}
{{- end -}}
{{- end }}

{{- /* Variables by name, later ones in place of earlier ones: server-side apply refuses a name that is there twice. */}}
{{- define "common.env" -}}
{{- $order := list }}{{ $byName := dict -}}
{{- range concat .defaults (fromJson (include "common.both" (dict "root" .root "role" .role "key" "env"))).it -}}
{{- if not (hasKey $byName .name) }}{{ $order = append $order .name }}{{ end -}}
{{- $_ := set $byName .name . -}}
{{- end -}}
{{- $all := list -}}
{{- range $order }}{{ $all = append $all (get $byName .) }}{{ end -}}
{{- toYaml $all -}}
{{- end }}

{{- define "common.podMetadata" -}}
{{- $annotations := (fromJson (include "common.both" (dict "root" .root "role" .role "key" "annotations"))).it -}}
{{- /* A node that is taken away to save money takes the whole attempt with it; workers are replaced. */}}
{{- if has .role (list "head" "submitter") -}}
{{- $annotations = merge $annotations (dict "cluster-autoscaler.kubernetes.io/safe-to-evict" "false" "karpenter.sh/do-not-disrupt" "true") -}}
{{- end -}}
{{- $labels := (fromJson (include "common.both" (dict "root" .root "role" .role "key" "labels"))).it -}}
labels:
  {{- include "common.selectorLabels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .role | kebabcase }}
  {{- with $labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "common.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "common.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* Where pods go and what they may do: everything of a pod's specification but containers and volumes. */}}
{{- define "common.podSettings" -}}
securityContext:
  {{- include "common.podSecurityContext" . | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "topologySpreadConstraints" }}
{{- with (fromJson (include "common.both" (dict "root" $.root "role" $.role "key" $key))).it }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- range $key := list "affinity" "priorityClassName" "runtimeClassName" "schedulerName" }}
{{- with (fromJson (include "common.either" (dict "root" $.root "role" $.role "key" $key))).it }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "common.envFrom" -}}
{{- with (fromJson (include "common.both" (dict "root" .root "role" .role "key" "envFrom"))).it }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "common.containerImage" -}}
image: {{ include "common.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}
