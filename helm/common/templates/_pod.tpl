{{- /*
Parts of a pod of any role. Every pod passes Pod Security "restricted" and writes to volumes only.
Takes dict root role; role is the key in the values (head, workers, cpuWorkers, submitter).
*/}}

{{- /*
A setting of a role. The submitter's placement defaults to the head's: both belong on CPU nodes that stay, and the operator has
no deadline for a submitter that finds no node.
*/}}
{{- define "common.own" -}}
{{- $own := get (get .root.Values .role) .key -}}
{{- if and (eq .role "submitter") (not $own) (has .key (list "nodeSelector" "tolerations" "affinity" "priorityClassName")) -}}
{{- $own = get .root.Values.head .key -}}
{{- end -}}
{{- toJson (dict "it" $own) -}}
{{- end }}

{{- /* A setting of the role, or of all pods if the role has none. */}}
{{- define "common.either" -}}
{{- $own := (fromJson (include "common.own" .)).it -}}
{{- $all := get .root.Values.pods .key -}}
{{- toJson (dict "it" (default $all $own)) -}}
{{- end }}

{{- /* Settings of all pods and of the role together: maps are merged, with the role's entries first, and lists are joined. */}}
{{- define "common.both" -}}
{{- $own := (fromJson (include "common.own" .)).it -}}
{{- $all := get .root.Values.pods .key -}}
{{- if kindIs "map" $all -}}
{{- toJson (dict "it" (merge (deepCopy $own) $all)) -}}
{{- else -}}
{{- toJson (dict "it" (default (list) (concat $all $own))) -}}
{{- end -}}
{{- end }}

{{- /* Environment variables; a later one replaces an earlier one of its name, since server-side apply refuses duplicate names. */}}
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
{{- /* If an autoscaler removes the node of these pods to save money, the attempt ends; workers are replaced. */}}
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

{{- /* Placement and rights: everything of a pod's specification except containers and volumes. */}}
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
