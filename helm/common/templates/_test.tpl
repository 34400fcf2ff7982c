{{- /*
The pod of `helm test`. It has the head's placement, identity and variables, so that it reaches what the Ray pods reach.
Takes dict root name args env; args is the command as a list.
*/}}
{{- define "common.testPod" -}}
{{- $context := dict "root" .root "role" "head" -}}
apiVersion: v1
kind: Pod
metadata:
  name: {{ .name | quote }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "common.labels" .root | nindent 4 }}
    app.kubernetes.io/component: test
  annotations:
    helm.sh/hook: test
    helm.sh/hook-delete-policy: before-hook-creation
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "common.serviceAccountName" .root | quote }}
  automountServiceAccountToken: false
  {{- include "common.podSettings" $context | nindent 2 }}
  containers:
    - name: test
      {{- include "common.containerImage" .root | nindent 6 }}
      securityContext:
        {{- include "common.containerSecurityContext" . | nindent 8 }}
      command:
        {{- toYaml .args | nindent 8 }}
      env:
        {{- $defaults := concat (list (dict "name" "HOME" "value" "/tmp")) (default (list) .env) }}
        {{- include "common.env" (merge (dict "defaults" $defaults) $context) | nindent 8 }}
      {{- include "common.envFrom" $context | nindent 6 }}
      resources:
        requests:
          cpu: 100m
          memory: 1Gi
        limits:
          memory: 1Gi
      volumeMounts:
        - name: scratch
          mountPath: /tmp
        {{- with (fromJson (include "common.both" (merge (dict "key" "volumeMounts") $context))).it }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: scratch
      emptyDir:
        sizeLimit: 1Gi
    {{- with (fromJson (include "common.both" (merge (dict "key" "volumes") $context))).it }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
