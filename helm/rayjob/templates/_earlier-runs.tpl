{{- /* Names of the release's earlier runs to keep: those that have not ended, and the newest of the others. Jobs own the runs of a schedule. */}}
{{- define "rayjob.earlierRuns" -}}
{{- $current := include "rayjob.name" . }}{{ $ended := list -}}
{{- range (lookup "ray.io/v1" "RayJob" .Release.Namespace "").items -}}
{{- $status := dig "status" "jobDeploymentStatus" "" . -}}
{{- $mine := eq (dig "metadata" "labels" "app.kubernetes.io/instance" "" .) $.Release.Name -}}
{{- if and $mine (ne .metadata.name $current) (not .metadata.deletionTimestamp) (not .metadata.ownerReferences) -}}
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

{{- /* ServiceAccounts that only earlier runs of the release use: a running job needs its own to replace a pod. */}}
{{- define "rayjob.earlierAccounts" -}}
{{- $current := list (include "common.serviceAccountName" .) (include "rayjob.submitterServiceAccountName" .) }}{{ $seen := dict -}}
{{- range include "rayjob.earlierRuns" . | splitList "\n" -}}
{{- with trim . -}}
{{- $spec := (lookup "ray.io/v1" "RayJob" $.Release.Namespace .).spec -}}
{{- range list (dig "submitterPodTemplate" "spec" "serviceAccountName" "" $spec) (dig "rayClusterSpec" "headGroupSpec" "template" "spec" "serviceAccountName" "" $spec) -}}
{{- if and . (not (has . $current)) (not (hasKey $seen .)) -}}
{{- $_ := set $seen . true -}}
{{- $account := lookup "v1" "ServiceAccount" $.Release.Namespace . -}}
{{- if eq (dig "metadata" "labels" "app.kubernetes.io/instance" "" $account) $.Release.Name }}
{{ . }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- /*
A run as it is in the cluster. The operator has filled in and rewritten parts of it: to apply the original text again would edit
the run, or would be refused with server-side apply. Kueue decides whether a queued run is suspended.
*/}}
{{- define "rayjob.asItIs" -}}
apiVersion: ray.io/v1
kind: RayJob
metadata:
  {{- include "rayjob.earlierMetadata" .metadata | nindent 2 }}
{{- $spec := .spec }}
{{- if hasKey .metadata.labels "kueue.x-k8s.io/queue-name" }}{{ $spec = omit $spec "suspend" }}{{ end }}
spec:
  {{- toYaml $spec | nindent 2 }}
{{- end }}

{{- /* Name, labels and annotations, without those that Helm writes. */}}
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
